"""The CPU backend: the ops of reference.py as Numba kernels, on float32 values and GGUF blocks as the file stores them."""
import numpy as np

from pydsa import quants
from pydsa.backends.cpu.attention import dense_attention, masked_attention, sparse_attention  # noqa: F401
from pydsa.backends.cpu.ceilings import measure_ceilings, product_kind  # noqa: F401
from pydsa.backends.cpu.indexer import indexer_scores, indexer_select, scatter_mask, score_floats  # noqa: F401
from pydsa.backends.cpu.linear import head_linear, linear  # noqa: F401
from pydsa.backends.cpu.mha import mha_attention, mha_sparse_attention  # noqa: F401
from pydsa.backends.cpu.moe import moe_down, moe_gate_up, moe_route  # noqa: F401
from pydsa.backends.cpu.norm import add, layer_norm, rms_norm, silu_mul  # noqa: F401
from pydsa.backends.cpu.rope import hadamard, rope, rope_table  # noqa: F401
from pydsa.backends.cpu.rows import CacheRows, Weight, cache_write, get_rows  # noqa: F401
from pydsa.backends.cpu.top_k import top_k  # noqa: F401
from pydsa.backends.cpu import amx
from pydsa.backends.cpu.byte_attention import attend_bytes
from pydsa.backends.cpu.byte_indexer import score_bytes
from pydsa.backends.cpu.byte_mha import attend_head_bytes, laid_bytes, lay_latent_bytes
from pydsa.backends.cpu.byte_rows import PREPARED, byte_rows, prepare_bytes
from pydsa.backends.cpu.float_attention import attend_floats
from pydsa.backends.cpu.float_mha import attend_head_floats, laid_float_bytes, lay_latent_floats
from pydsa.backends.cpu.float_rows import float_rows, prepare_floats
from pydsa.backends.cpu.split_attention import attend_splits
from pydsa.backends.cpu.split_indexer import score_splits, score_splits_of_few
from pydsa.backends.cpu.word_indexer import score_words
from pydsa.backends.cpu.word_rows import prepare_words, round_row, word_rows
from pydsa.jit import WordFunction, check_threads, compile_all, entry_point, is_listing, listing, set_threads  # noqa: F401
from pydsa.quants import whole_rows
from pydsa.quants.block import CHUNK
from pydsa.backends.reference import empty, fetch, free_bytes, recorded, store, timed, upload  # noqa: F401

FLOAT = np.float32
PICKS = 0       # logits are the host's, which picks from them
WEIGHTS_FIRST = False       # they hold addresses of compiled functions
ATTEND_FLOATS, ATTEND_SPLITS, ATTEND_BYTES = WordFunction(attend_floats), WordFunction(attend_splits), WordFunction(attend_bytes)
SCORE_FLOATS, SCORE_BYTES, SCORE_WORDS = WordFunction(score_floats), WordFunction(score_bytes), WordFunction(score_words)
SCORE_SPLITS, SCORE_SPLITS_OF_FEW = WordFunction(score_splits), WordFunction(score_splits_of_few)
# How heads attend by themselves: bytes of a tile of latents, lay, attend_head (mha.py)
BY_FLOATS = laid_float_bytes, WordFunction(lay_latent_floats), WordFunction(attend_head_floats)
BY_BYTES = laid_bytes, WordFunction(lay_latent_bytes), WordFunction(attend_head_bytes)
SPARE_ROWS = 32         # behind the last one: tiles are loaded whole, 64 bytes of each row
ROUND_ROW = WordFunction(round_row)
# How many tokens are multiplied: bytes for 256 numbers of a token, prepare, times (linear.py)
WITH_FLOATS = 4 * 256, WordFunction(prepare_floats), WordFunction(float_rows)
WITH_WORDS = CHUNK, WordFunction(prepare_words), WordFunction(word_rows)
WITH_BYTES = PREPARED // 16, WordFunction(prepare_bytes), WordFunction(byte_rows)


def many(kind):
    """How many tokens are multiplied with a BlockType."""
    if not kind.dot:
        return WITH_FLOATS
    return WITH_BYTES if amx.HERE else WITH_WORDS


def weight(tensor):
    """A GGUF tensor as its ops take it here: matrices in place as blocks, vectors as float32."""
    kind = quants.block_type(tensor.type)
    prepared, prepare, times = many(kind)
    unpack, few = kind.dequantize, ()
    if kind.dot:
        unpack, few = kind.unpack, (ROUND_ROW.address, kind.order.ctypes.data, kind.dot.address)
    w = Weight(tensor.data, kind.size, kind.dtype.itemsize, kind.lows, kind.bits, prepared, kind.dequantize.address, unpack.address,
               prepare.address, times.address, *few)
    if len(tensor.shape) > 1:
        return w
    values = np.empty((1, *tensor.shape), np.float32)
    if not is_listing():
        get_rows(values, w._replace(data=tensor.data[None]), np.zeros(1, np.int32))
    values.flags.writeable = False
    return values[0]


def compile_calls(bind, progress=None):
    """Compile the kernels of the calls that bind() gives, pairs of an op and its arguments.

    And the functions that these call by address. progress(done, total, name) is called before each. What bind() makes of weights and
    caches has no addresses: it must be made again.
    """
    with listing() as functions:
        calls = bind()
    compile_all(calls, functions, progress)


def cache_rows(n_ctx, widths, storage):
    """An empty cache of n_ctx rows of sum(widths) values, stored as quants.KV_TYPES says; the system gives pages as they are written."""
    if storage in quants.WHOLE_ROWS:
        n, (dequantize, quantize) = whole_rows.packed_parts(widths), whole_rows.FUNCTIONS[storage]
        functions = (ATTEND_BYTES, SCORE_BYTES, SCORE_BYTES) if storage == "i8" else (ATTEND_BYTES, SCORE_FLOATS, SCORE_FLOATS)
    else:
        kind = quants.block_type(quants.FLOAT_ROWS[storage])
        n, dequantize, quantize = sum(widths), kind.dequantize, kind.quantize
        functions = ATTEND_SPLITS, SCORE_SPLITS, SCORE_SPLITS_OF_FEW
    if not amx.HERE and storage == "i8":
        functions = ATTEND_FLOATS, SCORE_WORDS, SCORE_WORDS
    elif not amx.HERE or storage == "f32":      # float32 rows keep all their bits
        functions = ATTEND_FLOATS, SCORE_FLOATS, SCORE_FLOATS
    row_bytes = quants.cache_row_bytes(storage, widths)
    laid, lay, attend_head = BY_BYTES if amx.HERE and storage != "f32" else BY_FLOATS
    data = np.zeros((n_ctx + SPARE_ROWS) * row_bytes + 64, np.uint8)[:n_ctx * row_bytes].reshape(n_ctx, row_bytes)
    return CacheRows(data, dequantize.address, quantize.address, n, *(f.address for f in (*functions, lay, attend_head)),
                     laid(widths[0], sum(widths[1:])))


def cache_bytes(rows):
    """The cache's storage as bytes [n_ctx, row_bytes], a view: the same on every backend."""
    return rows.data
