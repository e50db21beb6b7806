"""Quantize float32 rows to any GGML type that a model file can hold."""

import gguf

from tools import iquants, kquants

QUANTIZERS = {**kquants.QUANTIZERS, **iquants.QUANTIZERS}


def quantize(x, kind):
    """Float32 rows x [n, n_in] in the GGML type `kind`.

    n_in is a multiple of the type's block. Returns bytes [n, row bytes], or numbers of an unquantized type. Types without a quantizer here
    are left to gguf-py.
    """
    if kind.name not in QUANTIZERS:
        return gguf.quants.quantize(x, kind)
    n, n_in = x.shape
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if n_in % block:
        raise ValueError(f"{kind.name} needs rows of a multiple of {block} numbers, not {n_in}")
    return QUANTIZERS[kind.name](x.reshape(-1, block)).reshape(n, -1)
