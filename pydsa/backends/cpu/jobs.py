"""Records: the arguments of kernels that are called by address.

The caller passes a record to call_kernel(); the kernel takes its address and begins with a read_..._job(). Fields are int64: addresses,
strides in bytes, counts of elements, the bits of a float32. "Function" means the address of a compiled function.
"""
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pydsa.backends.cpu.vectors.simd import I64, INTP, pointer


class AttendJob(NamedTuple):
    """Absorbed MLA attention of a task's queries, the heads of its tokens.

    out[t, h] = softmax(scale q[t, h] . key + mask) value over keys key_start to key_ends[t]. A key is a row of the cache; its first n_v
    values are the value. With indices, key s is the row indices[s].
    """
    thread: int         # whose scratch memory the kernel may use
    out: int            # float32 [n_tokens, n_head, n_v]
    out_token: int      # stride of a token in out
    out_head: int       # stride of a head in out
    q: int              # float32 [n_tokens, n_head, width]
    q_head: int         # stride of a query, through the heads of all tokens
    n_tokens: int
    n_head: int
    width: int          # values of a key
    n_v: int            # values of a value; at most the first part of a row of integers (integer_rows.py)
    rows: int           # the cache's rows
    row_bytes: int      # stride of a row
    dequantize: int     # function of the cache
    row_n: int          # its length argument for one row
    indices: int        # int32, the selected keys' rows; 0: all keys
    key_start: int      # the first key, for all tokens
    key_ends: int       # int64 [n_tokens], where each token's keys end
    scaled_end: int     # keys before it share scales with those of their tile, also where no query sees them; 0: only those that one sees
    mask: int           # float32 [n_tokens, n_kv]; 0: none
    mask_row: int       # stride of a token in mask
    scale: int          # float32 bits
    partial: int        # where row_max, row_sum and the sum of values of each query are written instead of out (attention.py); 0: nowhere
    few: int            # whether a step's token has few heads, for f32/attention.py
    coming: int         # regions to fetch (coming.py): `coming_bytes` of them, from `coming_first` on
    coming_first: int
    coming_bytes: int


class HeadJob(NamedTuple):
    """Plain MLA attention of one head, with keys and values from latents.

    out[t] = softmax(scale q[t] . (k_b^T latent, rotated)) (v_b latent) over the latents before key_ends[t].
    """
    thread: int         # whose scratch memory the kernel may use
    out: int            # float32 [n_tokens, n_v]
    out_token: int      # stride of a token in out
    q: int              # float32 [n_tokens, n_nope + n_rot]
    q_token: int        # stride of a token in q
    n_tokens: int
    n_nope: int         # values of a key that are not rotated
    n_rot: int          # rotated values of a key
    n_v: int            # values of a value
    kv_lora: int        # compressed values of a latent
    n_keys: int         # latents that are packed
    packed: int         # tiles of latents, packed by pack_latents
    packed_tile: int    # stride of a tile
    k_rows: int         # k_b [kv_lora, n_nope], rows of blocks
    k_row_bytes: int    # stride of a row
    k_dequantize: int   # function
    k_blocks: int       # blocks of a row
    v_rows: int         # v_b [n_v, kv_lora], rows of blocks
    v_row_bytes: int    # stride of a row
    v_dequantize: int   # function
    v_blocks: int       # blocks of a row
    key_ends: int       # int64 [n_tokens], where each token's keys end
    selected: int       # uint16 [n_tokens / 16, n_kv], a bit for each of 16 tokens (mha.py's mark_selected); 0: all keys
    selected_row: int   # stride of 16 tokens in selected
    scale: int          # float32 bits


class ScoreJob(NamedTuple):
    """The indexer's scores of keys `first` to `last` for all tokens.

    out[t][s] = scale sum_h w[t][h] relu(q[t][h] . key s). Scores may be written up to a multiple of 16 keys; those beyond `last` have no
    meaning.
    """
    thread: int         # whose scratch memory the kernel may use
    out: int            # float32 [n_tokens, n_kv]
    out_token: int      # stride of a token in out
    q: int              # float32 [n_tokens, n_head, width]
    q_token: int        # stride of a token in q
    q_head: int         # stride of a head in q
    w: int              # float32 [n_tokens, n_head], weights of the heads
    w_token: int        # stride of a token in w
    n_tokens: int
    n_head: int
    width: int          # values of a key
    rows: int           # the cache's rows
    row_bytes: int      # stride of a row; int8 rows are followed by 32 readable ones
    dequantize: int     # function of the cache
    row_n: int          # its length argument for one row
    first: int          # the first key
    last: int           # the key after the last
    scale: int          # float32 bits


class MatmulJob(NamedTuple):
    """A product of rows of weights with packed tokens.

    out_at[t][r] = row r . token first + t.
    """
    thread: int         # whose scratch memory the kernel may use
    unpack: int         # function of the weights' type: unpack, or dequantize if it is not quantized
    block: int          # elements of a block
    block_bytes: int
    mins: int           # BlockKernels.mins
    bits: int           # BlockKernels.bits
    unpack_tile: int    # BlockKernels.unpack_tile, or 0
    multiply_tiles: int     # BlockKernels.multiply_tiles, or 0
    one_scale: int      # whether `unpack` is BlockKernels.unpack_scaled
    rows: int           # rows of blocks
    n_rows: int
    row_bytes: int      # stride of a row
    n_in: int           # elements of a row
    x: int              # tokens, packed by pack
    n_packed: int       # how many tokens are packed
    first: int          # the first token to multiply, a multiple of 16
    n_tokens: int       # how many to multiply
    out_at: int         # int64 [n_tokens], the address of each token's output, float32 [n_rows]


@intrinsic
def call_kernel(typingctx, function, job):
    """Call an IntpFunction of one argument with the address of a record."""
    def codegen(context, builder, signature, args):
        record = cgutils.alloca_once(builder, ir.ArrayType(I64, len(job)))
        for i, kind in enumerate(job):
            value = context.cast(builder, builder.extract_value(args[1], i), kind, types.int64)
            builder.store(value, cgutils.gep_inbounds(builder, record, 0, i))
        kernel = ir.FunctionType(ir.VoidType(), [INTP]).as_pointer()
        builder.call(builder.inttoptr(args[0], kernel), [builder.ptrtoint(record, INTP)])
        return context.get_dummy_value()
    return types.void(types.intp, job), codegen


def _reader(record):
    n = len(record._fields)

    @intrinsic
    def read(typingctx, address):
        """Load a record from an address."""
        def codegen(context, builder, signature, args):
            fields = pointer(builder, args[0], ir.ArrayType(I64, n))
            return cgutils.pack_array(builder, [builder.load(cgutils.gep_inbounds(builder, fields, 0, i)) for i in range(n)])
        return types.NamedUniTuple(types.int64, n, record)(types.intp), codegen
    return read


read_attend_job, read_head_job = _reader(AttendJob), _reader(HeadJob)
read_score_job, read_matmul_job = _reader(ScoreJob), _reader(MatmulJob)
