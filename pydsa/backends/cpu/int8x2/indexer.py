"""The indexer's scores over keys of int8 (quants/whole_rows.py) in AMX tiles: keys are multiplied where they lie, with queries of 16 bits.

A head's query is rounded to whole numbers, of which the largest is 32,512, and their high and low bytes are multiplied (byte_rows.py). A
query's scale becomes part of its head's weight, a key's scale multiplies the sum over heads.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.amx import LOW_PARTS, STEP, SUMS, call_amx, configure, release
from pydsa.backends.cpu.int8x2.gemm import whole_numbers_of
from pydsa.backends.cpu.int8x2.panels import round_query
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.lanes import every, relu, row_sums, transpose
from pydsa.backends.cpu.scalars import float_from_bits
from pydsa.backends.cpu.scratch import own_scratch
from pydsa.backends.cpu.simd import I8, INTP, f32x16, float_at, i32x16, load_floats, multiply_add, pointer, prefetch, store


KEYS = 256          # that meet all tokens before the next: with 128 numbers each, 33 KiB
AHEAD = 4096        # bytes of keys that are asked for ahead


@intrinsic
def key_products(typingctx, keys, row_bytes, queries, n_steps, sums):
    """32 keys times sixteen heads: their products over n_steps steps of 64 numbers to 4 KiB at `sums`, for sixteen keys after the other.

    keys: int8 rows; queries: a panel of steps, sixteen heads turned over, high bytes and then low ones. Sums: int32 [key, head] of high
    bytes, then of low ones.
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
            call_amx(builder, "tilestored64", I8(register), at(sums, INTP(SUMS * register)), INTP(64))
        return context.get_dummy_value()
    return types.void(*[types.intp] * 5), codegen


@intrinsic
def whole_numbers(typingctx, high, low):
    """256 high + low of sixteen int32 each, at two addresses, as floats."""
    def codegen(context, builder, signature, args):
        return whole_numbers_of(builder, *(builder.load(pointer(builder, at, i32x16.ir), align=4) for at in args))
    return f32x16(types.intp, types.intp), codegen


def score(out, out_token, q, q_token, q_head, w, w_token, n_tokens, n_head, width, rows, row_bytes, dequantize, row_n, first, last,
          scale):
    """out[t][s] = scale sum_h w[t][h] relu(q[t][h] . key s) for first <= s < last, and without meaning up to a multiple of 16 keys.

    Addresses: out float32, q [T, H, width] and w [T, H] float32, of which tokens and heads lie so many bytes apart; rows of a cache whose
    keys are int8, with room for 32 more keys behind the last. scale: a float32's bits.
    """
    factor, n_steps, head_panels = float_from_bits(np.uint32(scale)), (width + 63) // 64, (n_head + 15) // 16
    panel_bytes = n_steps * STEP + 64       # and behind the steps the heads' weights
    queries = own_scratch(n_tokens * head_panels * panel_bytes + (4 * head_panels + 1) * SUMS + 256)
    sums = queries + n_tokens * head_panels * panel_bytes
    weighted = sums + 4 * head_panels * SUMS
    row = weighted + SUMS
    for i in range(n_tokens * head_panels):
        t, panel = i // head_panels, queries + i * panel_bytes
        for j in range(16):
            h = i % head_panels * 16 + j
            query_scale = round_query(q + t * q_token + min(h, n_head - 1) * q_head, width, row, panel + 64 * j)
            store(panel, n_steps * STEP + 4 * j, query_scale * float_at(w, t * w_token + 4 * h) if h < n_head else np.float32(0))
        for j in range(n_steps):
            for part in (0, LOW_PARTS):
                transpose(panel + j * STEP + part, 64, panel + j * STEP + part, 64)
    configure()
    for start in range(first, last, KEYS):
        for t in range(n_tokens):
            for s in range(start, min(start + KEYS, last), 32):
                keys = rows + s * row_bytes
                for j in range(head_panels):
                    key_products(keys, row_bytes, queries + (t * head_panels + j) * panel_bytes, n_steps, sums + 4 * j * SUMS)
                for i in range(2):
                    if s + 16 * i < last:
                        weigh_heads(queries + t * head_panels * panel_bytes + n_steps * STEP, panel_bytes, head_panels, sums + 2 * i * SUMS,
                                    weighted, keys + AHEAD + i * 16 * row_bytes, row_bytes)
                        scales = every(keys + 16 * i * row_bytes + width, row_bytes) * factor
                        store(out, t * out_token + 4 * (s + 16 * i), row_sums(weighted) * scales)
    release()


@inner
def weigh_heads(weights, panel_bytes, head_panels, sums, weighted, ahead, row_bytes):
    """Sixteen keys' products with all heads -> their weighed sums, still to be summed over sixteen lanes.

    Meanwhile sixteen rows from `ahead` on are asked for, a few lines at a time: all at once they wait for each other.
    """
    for k in range(16):
        at = sums + 64 * k
        prefetch(ahead, k * row_bytes)
        prefetch(ahead, k * row_bytes + 64)
        total = relu(whole_numbers(at, at + SUMS)) * load_floats(weights, 0)
        for j in range(1, head_panels):
            at = sums + 4 * j * SUMS + 64 * k
            total = multiply_add(total, relu(whole_numbers(at, at + SUMS)), load_floats(weights, j * panel_bytes))
        store(weighted, 64 * k, total)
