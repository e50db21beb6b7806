"""Helpers of several test files: backend under test, inputs, comparison.

`kernels` is the backend under test: the CPU's, or the GPU's with PYDSA_TEST_DEVICE=cuda. With NUMBA_ENABLE_CUDASIM=1 too, Numba's simulator
runs the GPU's kernels. With PYDSA_TEST_DEVICE=ptx they are compiled for a GPU, of PYDSA_TEST_CAPABILITY, and tests/ptx executes them. Both
are slow: where SIMULATED is true, tests take fewer and smaller shapes. The GPU's products are in the precision PYDSA_TEST_PRECISION.
"""
import importlib
import math
import os
from typing import NamedTuple

import gguf.quants
import numpy as np
from gguf import GGMLQuantizationType

from pydsa.backends import reference
from pydsa.backends.cpu.team import threads
from pydsa.backends.cpu.vectors import amx
from pydsa.gguf.file import Tensor
from pydsa.options import EXACT, FLOAT16
from pydsa.quants import CACHE_TYPES, TYPES

DEVICE = os.environ.get("PYDSA_TEST_DEVICE", "cpu")
PRECISION = os.environ.get("PYDSA_TEST_PRECISION", FLOAT16)
# Products in wgmma that are compiled in tests, and executed in test_hopper.py. All: python tools/cuda_ptx.py --cc 90 --only 'wgmma_.*'
WGMMA = "wgmma_(q4_k|q8_0|q5_k_64|q8_0_64|q6_k_64|q2_k_64|q4_1_64|iq2_xs_64)"
IN_SIMULATOR = DEVICE == "cuda" and os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
SIMULATED = IN_SIMULATOR or DEVICE == "ptx"
if DEVICE == "ptx":
    from tests.ptx.driver import install
    install().capability = tuple(map(int, os.environ.get("PYDSA_TEST_CAPABILITY", "8.0").split(".")))
    DEVICE = "cuda"


def write_files(root, files):
    """Write texts, {name: text}, each with a newline, as files of Linux have."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


class OnDevice:
    """A backend with arrays of its own, called with numpy arrays.

    Each call uploads its arrays, and copies what they hold afterwards back to the writable ones.
    """

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        function = getattr(self._backend, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args):
            roots = {}
            result = function(*(self._moved(a, roots) for a in args))
            for host, there in roots.values():
                if host.flags.writeable:
                    host[...] = self._backend.fetch(there)
            return self._backend.fetch(result) if isinstance(result, self._backend.DeviceArray) else result
        return call

    def _moved(self, a, roots):
        """A numpy array on the device, with the same strides.

        A slice of columns becomes the same slice of its uploaded base array, so that kernels are tested with strides.
        """
        if not isinstance(a, np.ndarray):
            return a
        root = a.base if isinstance(a.base, np.ndarray) and a.base.strides == a.strides and not a.flags.c_contiguous else a
        if id(root) not in roots:
            roots[id(root)] = root, self._backend.upload(np.ascontiguousarray(root))
        there = roots[id(root)][1]
        if a is root:
            return there
        start = (a.ctypes.data - root.ctypes.data) // a.itemsize
        return there[..., start:start + a.shape[-1]]


def choose(simulated, otherwise):
    """The shapes of a test: fewer and smaller ones where SIMULATED."""
    return simulated if SIMULATED else otherwise


kernels = importlib.import_module(f"pydsa.backends.{DEVICE}")
if SIMULATED:       # three tokens take tiles there, as 33 do on a GPU
    importlib.import_module("pydsa.backends.cuda.int8x2.gemv").MOST_TOKENS = 1
if DEVICE == "cuda":
    kernels.on(0, PRECISION).selected().__enter__()       # for this process
    kernels = OnDevice(kernels)

# A model that tests/ptx runs in seconds.
TINY = dict(n_layer=2, n_embd=32, n_head=2, n_lora_q=32, n_lora_kv=32, n_nope=32, n_rot=4, n_v=32, n_ff=32, n_expert=4, n_ff_exp=32,
            n_expert_groups=0, indexer_n_head=3, indexer_head_size=8, indexer_top_k=3, n_ctx=64)


def nmse(met, expected):
    """Normalised squared error: sum (met - expected)^2 / sum expected^2.

    Sums are over the last axis.
    """
    met, expected = np.asarray(met, np.float64), np.asarray(expected, np.float64)
    return ((met - expected) ** 2).sum(-1) / (expected ** 2).sum(-1)


def random_ids(n, seed=0, n_vocab=300):
    """n random token ids."""
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def greedy(session, logits, n):
    """Append the likeliest token n times, and return these tokens."""
    tokens = []
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
    return tokens


class Rows(NamedTuple):
    """A cache with these rows at positions 0, 1, ..., and zeros after them."""
    values: np.ndarray
    kv_type: str = "f32"
    n_v: int = 0        # the first n_v columns have a scale of their own in integer caches


def rng(*seed):
    """A random generator; the same seed gives the same numbers."""
    return np.random.default_rng([*seed, 0])


def normal(*shape):
    """Normal float32 values; the shape is the seed."""
    return rng(*shape).standard_normal(shape).astype(np.float32)


def integers(low, high, *shape):
    """Integers from low to high as float32.

    Sums and products of small integers are exact, so float32 must equal float64, ties included.
    """
    return rng(*shape, high).integers(low, high + 1, shape).astype(np.float32)


def dequantize(data, kind):
    """Rows of a GGUF type, by name, as gguf-py dequantizes them.

    It does not know Q1_0: a float16 d and 128 bits, d where a bit is set, else -d.
    """
    if kind != "Q1_0":
        return gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    blocks = data.reshape(-1, 18)
    bits = blocks[:, 2:, None] >> np.arange(8, dtype=np.uint8) & 1
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return ((bits.reshape(-1, 128) * np.float32(2) - 1) * d).reshape(*data.shape[:-1], -1)


def set_scales(blocks, kind, values, exponents=None):
    """Set the scales of blocks to values, or to float16 bits.

    Those of MXFP4 become 2^exponents; of NVFP4 the exponents are set, not the three bits of the mantissa.
    """
    names, bits = blocks.dtype.names, values if values.dtype == np.uint16 else values.astype(np.float16).view(np.uint16)
    for field in {"d", "dmin", "m"} & set(names):
        blocks[field] = bits
    if kind == "IQ1_M":     # four bits of d above the scales of each 64 weights
        blocks["scales"] = blocks["scales"] & 0x0FFF | (bits[:, None] >> np.uint16([0, 4, 8, 12]) & 15) << 12
    if kind == "MXFP4" and exponents is not None:
        blocks["e"] = exponents + 127
    if kind == "NVFP4" and exponents is not None:
        blocks["scales"] = blocks["scales"] & 7 | (exponents + 7)[:, None] << 3


def tensor(kind, *shape):
    """A read-only weight in the format of a GGUF file.

    It has random blocks with scales of about 1/50, or normal values for the float types.
    """
    dtype = TYPES[kind].dtype
    if dtype.names is None:
        data = gguf.quants.quantize(normal(*shape), GGMLQuantizationType[kind]).view(np.uint8)
    else:
        n = math.prod(shape) // TYPES[kind].size
        blocks = np.frombuffer(rng(*shape).bytes(n * dtype.itemsize), dtype).copy()
        set_scales(blocks, kind, rng(n).random(n) / 25, rng(n).integers(-6, -3, n))
        data = blocks.view(np.uint8)
    data = data.reshape(*shape[:-1], -1)
    data.flags.writeable = False
    return Tensor("w", kind, shape, data)


def some_keys(positions, k):
    """Chosen keys of each token's past, ascending, padded with -1.

    In turns: random keys, none, the latest, the earliest.
    """
    indices = np.full((len(positions), k), -1, np.int32)
    for t, position in enumerate(positions):
        past = np.arange(position + 1)
        order = [rng(t).permutation(past), past[:0], past[::-1], past][t % 4][:k - t % 3]
        indices[t, :order.size] = np.sort(order)
    return indices


def last_positions(n_tokens, n_kv):
    """The positions of the last n_tokens of a context of n_kv tokens."""
    return np.arange(n_kv - n_tokens, n_kv)


def run(backend, op, shapes, *args):
    """Run an op and return its outputs, float arrays of these shapes.

    A shape that is a list stands for an int32 array.
    """
    def argument(a):
        if isinstance(a, Tensor):
            return backend.weight(a)
        if isinstance(a, Rows):
            widths = tuple(filter(None, (a.n_v, a.values.shape[1] - a.n_v)))
            rows = backend.cache_rows(len(a.values) + 3, widths, a.kv_type)
            backend.cache_write(rows, a.values.astype(backend.FLOAT), np.arange(len(a.values)))
            return rows
        return a.astype(backend.FLOAT, copy=False) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a

    outs = [np.full(s, 77, np.int32) if isinstance(s, list) else np.full(s, np.nan, backend.FLOAT) for s in shapes]
    getattr(backend, op)(*outs, *(argument(a) for a in args))
    return outs if len(outs) > 1 else outs[0]


def close(found, expected, nmse=1e-12, size=None):
    """Whether float arrays agree within an NMSE, and integers are equal.

    Infinities must be in the same places, and there may be no NaN. The default bound is that of float32 rounding.
    size: the array whose squares normalise the error, instead of `expected`.
    """
    if found.dtype == np.int32:
        return np.array_equal(found, expected)
    finite = np.isfinite(expected)
    error = np.sum((found[finite] - expected[finite].astype(np.float64)) ** 2)
    size = (expected if size is None else size)[finite].astype(np.float64)
    return np.array_equal(found[~finite], expected[~finite]) and error <= nmse * np.sum(size ** 2)


def bound_of_tiles(rows, op):
    """The NMSE that is allowed where an op reads these cache rows.

    AMX tiles multiply pairs of bfloat16, where a value may be off by 2^-15, or 16-bit integers, where a value may be off by 1. So does all
    attention in MLA's plain form.
    """
    if DEVICE == "cpu" and op.startswith("mha") and rows.kv_type != "f32":
        return 1e-7
    if DEVICE == "cpu" and not amx.HERE or rows.kv_type == "f32":
        return 1e-8 if rows.kv_type == "i16" or "indexer" in op and rows.kv_type == "i8" else 0
    return 1e-8 if "indexer" in op else 2e-10 if not CACHE_TYPES[rows.kv_type].scaled else 1e-7


def rounds(args):
    """Whether an op with these arguments rounds activations.

    With quantized weights it does; on a GPU, to one float16, with all but float32.
    """
    types = [a.type for a in args if isinstance(a, Tensor)]
    return any(TYPES[kind].dtype.names or kind != "F32" and DEVICE == "cuda" and PRECISION != EXACT for kind in types)


def compare(op, shape, *args, size=None):
    """Assert that an op agrees with the reference, and return its output.

    The bound is wider for weights with which activations are rounded.
    """
    found, expected = run(kernels, op, [shape], *args), run(reference, op, [shape], *args)
    bound = max([1e-6 if rounds(args) else 1e-12, *(bound_of_tiles(a, op) for a in args if isinstance(a, Rows))])
    assert close(found, expected, bound, size)
    return found


def same_for_all_threads(op, shape, *args):
    """Whether an op gives the same bits for any number of threads.

    There may be more than cores. On a GPU it runs twice.
    """
    results = []
    for n in (1, 2, 3, 8) if DEVICE == "cpu" else (1, 2):
        threads.set_threads(n)
        results.append(run(kernels, op, [shape], *args))
    return all(np.array_equal(other, results[0]) for other in results[1:])
