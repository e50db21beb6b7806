"""The indexer's scores over int8 keys in int16, where there is no AMX.

Keys are rows of integer_rows.py. Sixteen keys are widened to int16 and transposed, so that each lane is a key: a dot product of int16
multiplies two values of each key with two of a query, broadcast to all lanes. Queries are rounded to 15 bits; their scales are folded into
the heads' weights.
"""
import numpy as np
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.jobs import read_score_job
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.lanes import load_strided, transpose
from pydsa.backends.cpu.vectors.rounding import max_abs_of
from pydsa.backends.cpu.vectors.scalars import float_from_bits
from pydsa.backends.cpu.vectors.simd import (F32, FEATURES, I32, INTP, broadcast, constant, f32x16, float_at, i16x32, i32x16, int16_dots,
                                             load_32_bytes, load_floats, pointer, store, store_int16, to_int16)


KEYS = 64                                           # scored for all tokens before the next
HEADS = 8 if "avx512bw" in FEATURES else 4          # whose sums are in registers at a time


@intrinsic
def weighted_scores(typingctx, tile, n_pairs, queries, query_bytes, weights, n_head):
    """Compute sixteen keys' sums over heads of weight * relu(q . key), f32x16.

    tile: n_pairs vectors of the keys' next two int16; queries: int16 with stride query_bytes; weights: float32; n_head is a multiple of
    HEADS.
    """
    def codegen(context, b, signature, args):
        tile, n_pairs, queries, query_bytes, weights, n_head = args

        def load(kind, address):
            return b.load(pointer(b, address, kind), align=4)

        def loop(n, start, body):
            """Emit start = body(i, start) for i < n, n > 0."""
            before, inside, after = b.block, b.append_basic_block("inside"), b.append_basic_block("after")
            b.branch(inside)
            b.position_at_end(inside)
            i = b.phi(INTP)
            i.add_incoming(INTP(0), before)
            phis = [b.phi(s.type) for s in start]
            for phi, s in zip(phis, start):
                phi.add_incoming(s, before)
            new = body(i, phis)
            following = b.add(i, INTP(1))
            for phi, s in zip([i, *phis], [following, *new]):
                phi.add_incoming(s, b.block)
            b.cbranch(b.icmp_signed("<", following, n), inside, after)
            b.position_at_end(after)
            return new

        def heads(i, sums):
            first = b.mul(i, INTP(HEADS))
            rows = [b.add(queries, b.mul(b.add(first, INTP(h)), query_bytes)) for h in range(HEADS)]

            def pair(k, sums):
                keys = b.bitcast(load(i32x16.ir, b.add(tile, b.mul(k, INTP(64)))), i16x32.ir)
                pairs = [b.bitcast(broadcast(b, load(I32, b.add(row, b.mul(k, INTP(4)))), 16), i16x32.ir) for row in rows]
                return [int16_dots(b, s, keys, x) for s, x in zip(sums, pairs)]

            total, = sums
            for h, dots in enumerate(loop(n_pairs, [constant([0] * 16)] * HEADS, pair)):
                dots = b.select(b.icmp_signed(">", dots, constant([0] * 16)), dots, constant([0] * 16))
                weight = load(F32, b.add(weights, b.mul(b.add(first, INTP(h)), INTP(4))))
                total = b.fadd(total, b.fmul(b.sitofp(dots, f32x16.ir), broadcast(b, weight, 16), flags=("contract",)), flags=("contract",))
            return [total]
        return loop(b.sdiv(n_head, INTP(HEADS)), [constant([0.0] * 16, F32)], heads)[0]
    return f32x16(*[types.intp] * 6), codegen


@inner
def round_to_int16(x, n, out, max_value):
    """Round n floats to int16 of magnitudes up to `max_value`.

    Zeros follow up to a multiple of 32. Returns the scale, which is not finite if a value is not.
    """
    size = max_abs_of(x, n)
    factor = np.float32(max_value) / size if size > np.float32(1e-30) and size < np.float32(np.inf) else np.float32(0)
    for k in range(0, n - 15, 16):
        store_int16(out + 2 * k, load_floats(x, 4 * k) * factor)
    for k in range(n // 16 * 16, (n + 31) // 32 * 32):
        store(out, 2 * k, np.int16(np.rint(float_at(x, 4 * k) * factor)) if k < n and factor > 0 else np.int16(0))
    return size / np.float32(max_value)


def score(job_at):
    """Run a ScoreJob: the indexer's scores."""
    job = read_score_job(job_at)
    factor = float_from_bits(np.uint32(job.scale))
    padded, heads = (job.width + 31) // 32 * 32, (job.n_head + HEADS - 1) // HEADS * HEADS
    max_value = min(16383, (2**31 - 1) // (127 * padded))        # so that no sum exceeds 31 bits
    token_bytes = heads * (2 * padded + 4)
    queries = thread_scratch(job.thread, job.n_tokens * token_bytes + 32 * padded + 2 * KEYS * padded + 64)
    widened = (queries + job.n_tokens * token_bytes + 63) // 64 * 64
    tiles = widened + 32 * padded
    for t in range(job.n_tokens):
        for h in range(heads):
            at, weights = queries + t * token_bytes, queries + t * token_bytes + 2 * heads * padded
            query = job.q + t * job.q_token + min(h, job.n_head - 1) * job.q_head
            query_scale = round_to_int16(query, job.width, at + 2 * h * padded, max_value)
            store(weights, 4 * h, query_scale * float_at(job.w, t * job.w_token + 4 * h) if h < job.n_head else np.float32(0))
    for start in range(job.first, job.last, KEYS):
        end = min(start + KEYS, job.last)
        for s in range(start, end, 16):
            for i in range(16):
                for k in range(0, padded, 32):
                    store(widened, 2 * (i * padded + k), to_int16(load_32_bytes(job.rows + (s + i) * job.row_bytes, k)))
            for k in range(0, padded, 32):
                transpose(widened + 2 * k, 2 * padded, tiles + 2 * (s - start) * padded + 32 * k, 64)
        for t in range(job.n_tokens):
            at = queries + t * token_bytes
            for s in range(start, end, 16):
                total = weighted_scores(tiles + 2 * (s - start) * padded, padded // 2, at, 2 * padded, at + 2 * heads * padded, heads)
                key_scales = load_strided(job.rows + s * job.row_bytes + job.width, job.row_bytes)
                store(job.out, t * job.out_token + 4 * s, total * (key_scales * factor))
