"""The indexer's scores over int8 keys in AMX tiles.

Keys are rows of integer_rows.py, multiplied in place with queries of 16 bits. A head's query is rounded to int16 of magnitudes up to
32,512, split into high and low bytes (linear.py). A query's scale is folded into its head's weight; a key's scale multiplies the sum over
heads.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.int8x2.gemm import int8x2_to_floats
from pydsa.backends.cpu.int8x2.panels import round_query
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.jobs import read_score_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.amx import LOW_PARTS, STEP, TILE_BYTES, call_amx, configure, release
from pydsa.backends.cpu.vectors.lanes import load_strided, relu, row_sums, transpose
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import I8, INTP, f32x16, float_at, i32x16, load_floats, multiply_add, pointer, prefetch, store


KEYS = 256          # scored for all tokens before the next: with 128 values each, 33 KiB
AHEAD = 4096        # prefetch distance in bytes of keys


@intrinsic
def key_products(typingctx, keys, row_bytes, queries, n_steps, sums):
    """Multiply 32 keys with sixteen heads over n_steps steps of 64 values.

    keys: int8 rows with stride row_bytes; queries: a B panel of sixteen heads, high bytes and then low ones. sums: 4 KiB, for sixteen keys
    after the other: int32 [key, head] of high bytes, then of low ones.
    """
    def codegen(context, builder, signature, args):
        keys, row_bytes, queries, n_steps, sums = args

        def at(base, *offsets):
            for offset in offsets:
                base = builder.add(base, offset)
            return pointer(builder, base, I8)

        for register in range(4):
            call_amx(builder, "tilezero", I8(register))
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(INTP)
        step.add_incoming(INTP(0), before)
        along, offset = builder.mul(step, INTP(64)), builder.mul(step, INTP(STEP))
        call_amx(builder, "tileloadd64", I8(6), at(queries, offset), INTP(64))
        call_amx(builder, "tileloadd64", I8(7), at(queries, offset, INTP(LOW_PARTS)), INTP(64))
        for i in (0, 1):
            call_amx(builder, "tileloadd64", I8(4 + i), at(keys, along, builder.mul(row_bytes, INTP(16 * i))), row_bytes)
            call_amx(builder, "tdpbssd", I8(2 * i), I8(4 + i), I8(6))
            call_amx(builder, "tdpbssd", I8(2 * i + 1), I8(4 + i), I8(7))
        following = builder.add(step, INTP(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, n_steps), loop, after)
        builder.position_at_end(after)
        for register in range(4):
            call_amx(builder, "tilestored64", I8(register), at(sums, INTP(TILE_BYTES * register)), INTP(64))
        return context.get_dummy_value()
    return types.void(*[types.intp] * 5), codegen


@intrinsic
def load_int8x2_sums(typingctx, high, low):
    """Load 256 high + low of sixteen int32 each, as floats."""
    def codegen(context, builder, signature, args):
        return int8x2_to_floats(builder, *(builder.load(pointer(builder, at, i32x16.ir), align=4) for at in args))
    return f32x16(types.intp, types.intp), codegen


def score(job_at):
    """Run a ScoreJob: the indexer's scores."""
    job = read_score_job(job_at)
    factor, n_steps, head_panels = float_from_bits(np.uint32(job.scale)), (job.width + 63) // 64, (job.n_head + 15) // 16
    panel_bytes = n_steps * STEP + 64       # the heads' weights follow the steps
    queries = thread_scratch(job.thread, job.n_tokens * head_panels * panel_bytes + (4 * head_panels + 1) * TILE_BYTES + 256)
    sums = queries + job.n_tokens * head_panels * panel_bytes
    weighted = sums + 4 * head_panels * TILE_BYTES
    row = weighted + TILE_BYTES
    for i in range(job.n_tokens * head_panels):
        t, panel = i // head_panels, queries + i * panel_bytes
        for j in range(16):
            h = i % head_panels * 16 + j
            query = job.q + t * job.q_token + min(h, job.n_head - 1) * job.q_head
            query_scale = round_query(query, job.width, row, panel + 64 * j)
            weight = query_scale * float_at(job.w, t * job.w_token + 4 * h) if h < job.n_head else np.float32(0)
            store(panel, n_steps * STEP + 4 * j, weight)
        for j in range(n_steps):
            for part in (0, LOW_PARTS):
                transpose(panel + j * STEP + part, 64, panel + j * STEP + part, 64)
    configure()
    for start in range(job.first, job.last, KEYS):
        for t in range(job.n_tokens):
            for s in range(start, min(start + KEYS, job.last), 32):
                keys = job.rows + s * job.row_bytes
                for j in range(head_panels):
                    key_products(keys, job.row_bytes, queries + (t * head_panels + j) * panel_bytes, n_steps, sums + 4 * j * TILE_BYTES)
                for i in range(2):
                    if s + 16 * i < job.last:
                        weigh_heads(queries + t * head_panels * panel_bytes + n_steps * STEP, panel_bytes, head_panels,
                                    sums + 2 * i * TILE_BYTES, weighted, keys + AHEAD + i * 16 * job.row_bytes, job.row_bytes)
                        scales = load_strided(keys + 16 * i * job.row_bytes + job.width, job.row_bytes) * factor
                        store(job.out, t * job.out_token + 4 * (s + 16 * i), row_sums(weighted) * scales)
    release()


@inner
def weigh_heads(weights, panel_bytes, head_panels, sums, weighted, ahead, row_bytes):
    """Sum sixteen keys' products over heads with weights.

    The results are still to be summed over sixteen lanes. Meanwhile sixteen rows from `ahead` on are prefetched, a few lines at a time:
    many prefetches at once wait for each other.
    """
    for k in range(16):
        at = sums + 64 * k
        prefetch(ahead, k * row_bytes)
        prefetch(ahead, k * row_bytes + 64)
        total = relu(load_int8x2_sums(at, at + TILE_BYTES)) * load_floats(weights, 0)
        for j in range(1, head_panels):
            at = sums + 4 * j * TILE_BYTES + 64 * k
            total = multiply_add(total, relu(load_int8x2_sums(at, at + TILE_BYTES)), load_floats(weights, j * panel_bytes))
        store(weighted, 64 * k, total)
