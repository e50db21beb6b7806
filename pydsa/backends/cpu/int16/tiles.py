"""Products of a few tokens with tiles, whose vectors have a lane a row.

Eight tokens pass over two tiles. Rows are unpacked once for all of them, as bytes, which are widened to int16 beside the products.
Activations are packed as for more tokens, and sums are the same, bit for bit.
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.blocks.block import MINS, SUPERBLOCK
from pydsa.backends.cpu.int16.gemm import TILE, Emitter
from pydsa.backends.cpu.jit import call_intp_function, inner
from pydsa.backends.cpu.scratch import thread_scratch
from pydsa.backends.cpu.vectors.simd import (FEATURES, I8, I16, I32, INTP, broadcast, call_llvm, constant, i16x32, i32x16, i64_at, pointer,
                                             prefetch, store)

TILES_HERE = {"avx512vnni", "avx512bw", "f16c"} <= FEATURES
FEW_ROWS, FEW_TOKENS = 2, 8     # groups of 16 rows, and tokens: their sums fit into 32 registers beside the operands
FACTORS = 4096      # where in a tile the scales of sub-blocks are, in each int16: as low bytes, then as high ones; for each sub-block
ZEROS = 6144        # and what zero is times these scales, in each int16
BYTES = ir.VectorType(I8, 64)
ROWS = 16 * FEW_ROWS        # rows that pass over the tokens together


class _TileEmitter(Emitter):
    """Emits products of tiles of one type with `n` values of tokens.

    ahead: memory that is prefetched meanwhile, `part` bytes for each column: four values of rows, or with `nibbles` eight.
    """
    part = 0

    def __init__(self, builder, tiles, x_at, x_offset, n, ahead):
        super().__init__(builder, FEW_ROWS, FEW_TOKENS, tiles, x_at, x_offset)
        self.n, self.ahead = n, ahead

    def columns(self, i, c, n):
        """Load column c of group i of all tiles, and prefetch as much.

        n: how many columns a group has.
        """
        index = self.builder.add(self.builder.mul(i, INTP(n)), c)
        self.fetch(index)
        return self.tile_columns(self.builder.mul(index, INTP(64)))

    def fetch(self, index):
        """Prefetch `part` bytes, as the index-th of all parts."""
        b = self.builder
        line = b.add(self.ahead, b.mul(index, INTP(self.part)))
        for offset in range(0, self.part, 64):      # some lines at a time: of more the last ones would wait for the first
            call_llvm(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(b, b.add(line, INTP(offset)), I8), I32(0), I32(2), I32(1)])

    def tile_columns(self, offset, kind=i32x16.ir):
        """Load the columns at an offset of all tiles."""
        b = self.builder
        return [self.load(kind, b.add(b.add(self.tiles, INTP(r * TILE)), offset), 64) for r in range(self.n_tiles)]

    def dots_of(self, w, xs, displacement, sums):
        """Emit sums + w . two int16 of each token, at the addresses xs + displacement.

        As text, or LLVM would make two instructions of a product to shorten the chain, and load all tokens first, for which there are no
        registers.
        """
        b, new, v = self.builder, [], i32x16.ir
        kind = ir.FunctionType(ir.LiteralStructType([v] * 3), [v, v, i16x32.ir, i16x32.ir, INTP])
        for x, first, second in zip(xs, sums[:self.n_tokens], sums[self.n_tokens:]):
            new.append(b.asm(kind, f"vpbroadcastd {displacement}($7), $2; vpdpwssd $2, $5, $0; vpdpwssd $2, $6, $1",
                             "=v,=v,=&v,0,1,v,v,r", [first, second, *w, x], False))
        return [b.extract_value(one, r) for r in range(FEW_ROWS) for one in new]

    def tokens_at(self, i, n, offset):
        """Emit the addresses of all tokens' i-th n values, plus an offset."""
        offset = self.builder.add(self.builder.mul(i, INTP(2 * n)), offset)
        return [self.builder.add(x, offset) for x in self.xs]

    def dots(self, i, n):
        step = 8 if self.nibbles else 4
        return self.loop(INTP(n // step), [constant([0] * 16)] * len(self.pairs), lambda c, sums: self.add_dots(i, n, c, sums))


class _Q4KEmitter(_TileEmitter):
    """Q4_K: columns of two nibbles, 32 values and the next 32; FACTORS; SCALES, d; MINS."""
    part, nibbles = 144, True

    def add_dots(self, i, n, c, sums):
        b, q, xs = self.builder, self.columns(i, c, n // 8), self.tokens_at(i, n, self.builder.mul(c, INTP(4)))
        for nibble in (0, 1):
            v = [b.and_(b.lshr(v, constant([4 * nibble] * 16)), constant([0x0F0F0F0F] * 16)) for v in q]
            for odd in (0, 1):
                factors = self.tile_columns(b.add(b.mul(i, INTP(256)), INTP(FACTORS + 128 * nibble + 64 * odd)), BYTES)
                sums = self.dots_of([scaled(b, *pair) for pair in zip(v, factors)], xs, 64 * nibble + 32 * odd, sums)
        return sums

    def sums(self):
        return self.loop(INTP(8), self.products(None), self.subtract_mins(MINS))


class _Q6KEmitter(_TileEmitter):
    """Q6_K: columns of bytes as stored; FACTORS, of each 16; what 32 is then; SCALES, d.

    For each half of the values 16 columns of nibbles, and behind those of both halves 8 of their fifth and sixth bits.
    """
    part, nibbles = 210, True

    def add_dots(self, i, n, c, sums):
        b, half = self.builder, self.builder.lshr(i, INTP(1))
        high_nibbles = b.trunc(b.and_(i, INTP(1)), I32)
        self.fetch(b.add(b.mul(i, INTP(n // 8)), c))
        column, xs = b.mul(c, INTP(64)), self.tokens_at(i, n, b.mul(c, INTP(4)))
        high = self.tile_columns(b.add(b.add(b.mul(half, INTP(512)), INTP(2048)), column))
        group = b.add(b.mul(i, INTP(4)), b.lshr(c, INTP(2)))
        for second in (0, 1):
            low = self.tile_columns(b.add(b.add(b.mul(half, INTP(1024)), INTP(512 * second)), column))
            turn = b.sub(I32(4 - 2 * second), b.mul(high_nibbles, I32(4)))
            v = [self.six_bits(*pair, b.mul(high_nibbles, I32(4)), turn) for pair in zip(low, high)]
            at = b.add(group, INTP(2 * second))
            zeros = [b.bitcast(zero, i16x32.ir) for zero in self.tile_columns(b.add(b.mul(at, INTP(64)), INTP(ZEROS)))]
            for odd in (0, 1):
                factors = self.tile_columns(b.add(b.mul(at, INTP(128)), INTP(FACTORS + 64 * odd)), BYTES)
                w = [b.sub(scaled(b, *pair), zero) for *pair, zero in zip(v, factors, zeros)]
                sums = self.dots_of(w, xs, 64 * second + 32 * odd, sums)
        return sums

    def six_bits(self, low, high, shift, turn):
        """Join the nibbles and the two high bits of bytes.

        shift: where in their bytes the nibbles are; turn: how far to the left lanes are turned, which brings the high bits to their place.
        """
        b = self.builder
        low = b.and_(b.lshr(low, broadcast(b, shift, 16)), constant([0x0F0F0F0F] * 16))
        high = call_llvm(b, "llvm.fshl.v16i32", i32x16.ir, [high, high, broadcast(b, turn, 16)])
        return b.or_(low, b.and_(high, constant([0x30303030] * 16)))

    def sums(self):
        return self.products(None)


class _Q50Emitter(_TileEmitter):
    """Q5_0: columns of bytes, values plus 16; SCALES."""
    part, nibbles = 88, False

    def add_dots(self, i, n, c, sums):
        b, v, xs = self.builder, self.columns(i, c, n // 4), self.tokens_at(i, n, self.builder.mul(c, INTP(4)))
        for odd in (0, 1):
            w = [b.bitcast(column, i16x32.ir) for column in v]
            w = [b.lshr(one, constant([8] * 32, I16)) if odd else b.and_(one, constant([255] * 32, I16)) for one in w]
            w = [b.sub(one, constant([16] * 32, I16)) for one in w]
            sums = self.dots_of(w, xs, 32 * odd, sums)
        return sums

    def sums(self):
        return self.products(self.builder.udiv(self.n, INTP(32)))


def scaled(builder, v, factors):
    """Emit bytes times factors as int16: pairs, of which one factor is 0."""
    return call_llvm(builder, "llvm.x86.avx512.pmaddubs.w.512", i16x32.ir, [builder.bitcast(v, BYTES), factors])


def _make_products(emitter):
    @intrinsic
    def tile_products(typingctx, tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead):
        """Compute sums + rows of the tiles . superblocks of tokens, as whole_products does."""
        def codegen(context, builder, signature, args):
            tiles, n, x_at, x_offset, before_at, out_at, out_offset, ahead = args
            emit = emitter(builder, tiles, x_at, x_offset, n, ahead)
            emit.finish(emit.sums(), before_at, out_at, out_offset)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 8), codegen
    return tile_products


q4_k_products, q6_k_products, q5_0_products = _make_products(_Q4KEmitter), _make_products(_Q6KEmitter), _make_products(_Q50Emitter)


@inner
def takes_few(job):
    """Whether a MatmulJob is one for matmul_few, with enough rows."""
    return job.multiply_tiles != 0 and job.n_rows >= ROWS and job.n_tokens <= 2 * FEW_TOKENS


@inner
def matmul_few(job):
    """Run a MatmulJob of at least ROWS rows and a few tokens.

    The last rows are a whole number of tiles, too: some are multiplied twice.
    """
    padded = (job.n_tokens + FEW_TOKENS - 1) // FEW_TOKENS * FEW_TOKENS      # padded by repeating the last token
    x_at = thread_scratch(job.thread, 16 * padded + FEW_ROWS * TILE)
    out_at, tiles = x_at + 8 * padded, x_at + 16 * padded
    for t in range(padded):
        store(x_at, 8 * t, job.x + (job.first + min(t, job.n_tokens - 1)) * SUPERBLOCK)
        store(out_at, 8 * t, i64_at(job.out_at, 8 * min(t, job.n_tokens - 1)))
    for line in range(0, ROWS * job.row_bytes, 64):
        prefetch(job.rows, line)
    for r in range(0, job.n_rows, ROWS):
        r = min(r, job.n_rows - ROWS)
        for k in range(0, job.n_in, 256):
            n, at = min(256, job.n_in - k), k // job.block * job.block_bytes
            for i in range(FEW_ROWS):
                rows = job.rows + (r + 16 * i) * job.row_bytes + at
                call_intp_function(job.unpack_tile, (rows, job.row_bytes, n, tiles + i * TILE))
            x_offset, ahead = k // 256 * job.n_packed * SUPERBLOCK, job.rows + (r + ROWS) * job.row_bytes + ROWS * at
            for t in range(0, 8 * padded, 8 * FEW_TOKENS):
                before = out_at + t if k else 0
                call_intp_function(job.multiply_tiles, (tiles, n, x_at + t, x_offset, before, out_at + t, 4 * r, ahead))
