"""Register-blocked matrix products of int16 with scales.

int16_products, whole_products: of superblocks (blocks/block.py). matmul_pairs: of rows and tiles of any width, in pairs of int16.
"""
from numba import types
from numba.extending import intrinsic

from pydsa.backends.cpu.blocks.block import MINS, MINS_16, SCALES, SUPERBLOCK
from pydsa.backends.cpu.jit import inner
from pydsa.backends.cpu.vectors.simd import (F32, FAST, I32, INT16_ROWS, INT16_TOKENS, INTP, broadcast, constant, f32x16, i16x32, i32x16,
                                             int16_dots, pointer)


TILE_ROWS = 16 * INT16_ROWS          # rows that int16_products takes at a time
# Values whose products are summed in int32, in whole_products. At most LARGEST_SUM, the sum of the magnitudes of GROUP activations, times
# 4096, the largest weight: so it fits, and 32 activations more than fit.
GROUP, LARGEST_SUM = 64, 524_200


# A tile is 16 rows of superblocks in which each 64-byte column is transposed as 16 x 16 cells of four bytes: the cells of one column are
# contiguous.
TILE = 16 * SUPERBLOCK


class Emitter:
    """Emits the loops of int16_products, for a block of tiles x tokens."""

    def __init__(self, builder, n_tiles, n_tokens, tiles, x_at, x_offset):
        self.builder, self.tiles = builder, tiles
        self.n_tiles, self.n_tokens = n_tiles, n_tokens
        self.pairs = [(r, t) for r in range(n_tiles) for t in range(n_tokens)]
        self.xs = self.table(x_at, x_offset)

    def load(self, kind, address, align=4):
        return self.builder.load(pointer(self.builder, address, kind), align=align)

    def table(self, base, offset):
        """Load the tokens' addresses from an array, and add an offset."""
        b = self.builder
        return [b.add(self.load(INTP, b.add(base, INTP(8 * t)), 8), offset) for t in range(self.n_tokens)]

    def cell(self, table, r, t):
        return self.builder.add(table[t], INTP(64 * r))

    def loop(self, n, sums, body):
        """Emit sums = body(i, sums) for i < n."""
        b = self.builder
        before, head, inside, after = b.block, *(b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(INTP)
        i.add_incoming(INTP(0), before)
        phis = [b.phi(s.type) for s in sums]
        for phi, s in zip(phis, sums):
            phi.add_incoming(s, before)
        b.cbranch(b.icmp_signed("<", i, n), inside, after)
        b.position_at_end(inside)
        new = body(i, phis)
        for phi, s in zip(phis, new):
            phi.add_incoming(s, b.block)
        i.add_incoming(b.add(i, INTP(1)), b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def where_given(self, address, emit):
        """Emit what emit() does for all pairs, or zeros if an address is 0."""
        b = self.builder
        with b.if_else(b.icmp_signed("!=", address, INTP(0))) as (then, otherwise):
            with then:
                emitted, then_block = emit(), b.block
            with otherwise:
                otherwise_block = b.block
        sums = [b.phi(f32x16.ir) for _ in self.pairs]
        for phi, value in zip(sums, emitted):
            phi.add_incoming(value, then_block)
            phi.add_incoming(constant([0.0] * 16, F32), otherwise_block)
        return sums

    def start(self, before_at, offset):
        """Emit the sums so far, or zeros if there are none."""
        def loaded():
            before = self.table(before_at, offset)
            return [self.load(f32x16.ir, self.cell(before, r, t)) for r, t in self.pairs]
        return self.where_given(before_at, loaded)

    def finish(self, sums, before_at, out_at, offset):
        """Store the sums so far + sums times the scales of tokens."""
        b, scales = self.builder, self.of_tokens(SCALES, INTP(0))
        before, outs = self.start(before_at, offset), self.table(out_at, offset)
        for s, x, (r, t) in zip(sums, before, self.pairs):
            s = b.fadd(x, b.fmul(s, scales[t], flags=FAST), flags=FAST)
            b.store(s, pointer(b, self.cell(outs, r, t), f32x16.ir), align=4)

    def dots(self, i, n):
        """Emit the dot products of group i of n values, as int32."""
        b, steps = self.builder, n // 2
        tile, xs = b.add(self.tiles, b.mul(i, INTP(64 * steps))), [b.add(x, b.mul(i, INTP(4 * steps))) for x in self.xs]

        def body(k, sums):      # not unrolled: LLVM would make two instructions of each dot product, to shorten the chain
            w = [b.bitcast(self.load(i32x16.ir, b.add(tile, b.add(INTP(r * TILE), b.mul(k, INTP(64)))), 64), i16x32.ir)
                 for r in range(self.n_tiles)]
            pairs = [self.load(I32, b.add(x, b.mul(k, INTP(4)))) for x in xs]
            pairs = [b.bitcast(broadcast(b, x, 16), i16x32.ir) for x in pairs]
            return [int16_dots(b, s, w[r], pairs[t]) for s, (r, t) in zip(sums, self.pairs)]
        return self.loop(INTP(steps), [constant([0] * 16)] * len(self.pairs), body)

    def of_rows(self, part, i):
        """Emit the i-th scales or mins of all rows."""
        b = self.builder
        column = b.add(b.add(self.tiles, INTP(16 * part)), b.mul(i, INTP(64)))
        return [self.load(f32x16.ir, b.add(column, INTP(r * TILE)), 64) for r in range(self.n_tiles)]

    def of_tokens(self, part, i):
        """Emit the i-th number of a part of all tokens, each broadcast."""
        b = self.builder
        return [broadcast(b, self.load(F32, b.add(b.add(x, INTP(part)), b.mul(i, INTP(4)))), 16) for x in self.xs]

    def add_group(self, i, sums):
        """Emit sums + dot products of the i-th GROUP values."""
        return [self.builder.fadd(s, self.builder.sitofp(d, f32x16.ir), flags=FAST) for s, d in zip(sums, self.dots(i, GROUP))]

    def add_scaled_group(self, i, sums):
        """Emit sums + scales * dot products of the i-th 32 values."""
        b, dots, w = self.builder, self.dots(i, 32), self.of_rows(SCALES, i)
        return [b.fadd(s, b.fmul(b.sitofp(d, f32x16.ir), w[r], flags=FAST), flags=FAST) for s, d, (r, _) in zip(sums, dots, self.pairs)]

    def products(self, n_scales):
        """Emit the products of rows and tokens; n_scales: None for one scale."""
        b, zeros = self.builder, [constant([0.0] * 16, F32)] * len(self.pairs)
        if n_scales is not None:
            return self.loop(n_scales, zeros, self.add_scaled_group)
        sums, w = self.loop(INTP(256 // GROUP), zeros, self.add_group), self.of_rows(SCALES, INTP(0))
        return [b.fmul(s, w[r], flags=FAST) for s, (r, _) in zip(sums, self.pairs)]

    def subtract_mins(self, part):
        """Return a loop body that subtracts the i-th products of mins."""
        def body(i, sums):
            b, w, x = self.builder, self.of_rows(part, i), self.of_tokens(part, i)
            return [b.fsub(s, b.fmul(w[r], x[t], flags=FAST), flags=FAST) for s, (r, t) in zip(sums, self.pairs)]
        return body


def _make_int16_products(rows, tokens, one_scale):
    @intrinsic
    def int16_products(typingctx, tiles, n_scales, n_mins, n_mins_16, x_at, x_offset, before_at, out_at, out_offset):
        """Compute sums + rows of the tiles . superblocks of tokens.

        *(out_at[t] + out_offset)[r] = *(before_at[t] + out_offset)[r] + row r . superblock *(x_at[t] + x_offset). before_at may be 0: the
        sums start at zero. n_scales, n_mins, n_mins_16: how many groups of 32, mins and mins of 16 are in use. In whole_products rows have
        one scale, the first one, and all 256 values are in use.
        """
        def codegen(context, builder, signature, args):
            tiles, n_scales, n_mins, n_mins_16, x_at, x_offset, before_at, out_at, out_offset = args
            emit = Emitter(builder, rows, tokens, tiles, x_at, x_offset)
            sums = emit.products(None if one_scale else n_scales)
            sums = emit.loop(n_mins, sums, emit.subtract_mins(MINS))
            sums = emit.loop(n_mins_16, sums, emit.subtract_mins(MINS_16))
            emit.finish(sums, before_at, out_at, out_offset)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 9), codegen
    return int16_products


int16_products, whole_products = (_make_int16_products(INT16_ROWS, INT16_TOKENS, one_scale) for one_scale in (False, True))


# Rows of pairs are int16 rows of which each 32 values are 16 pairs, of values k and k + 16. A tile of pairs is 16 such rows, transposed:
# 64 bytes for the first pair of all rows, and so on. The products of 64 values are summed in int32. If the norm of 64 integers is at most
# MAX_NORM on each side, so is that of a part of them, and the sums are below 2^31 (Cauchy-Schwarz).
MAX_NORM = 32767
PAIR_TOKENS = 8 if INT16_ROWS == 2 else INT16_TOKENS       # rows that pair_products takes at a time, beside INT16_ROWS tiles


class _PairEmitter(Emitter):
    """Emits the loops of pair_products."""

    def __init__(self, builder, n_tiles, n_tokens, tiles, tile_bytes, x, x_row):
        self.builder = builder
        self.pairs = [(r, t) for r in range(n_tiles) for t in range(n_tokens)]
        self.tiles = [builder.add(tiles, builder.mul(tile_bytes, INTP(r))) for r in range(n_tiles)]
        self.xs = [builder.add(x, builder.mul(x_row, INTP(t))) for t in range(n_tokens)]

    def dots(self, first, n):
        """Emit the dot products of n pairs from `first` on, as int32."""
        b, tile_at, x_at = self.builder, self.builder.mul(first, INTP(64)), self.builder.mul(first, INTP(4))
        tiles, xs = ([b.add(at, offset) for at in addresses] for addresses, offset in ((self.tiles, tile_at), (self.xs, x_at)))

        def body(k, sums):      # not unrolled, as in Emitter
            w = [b.bitcast(self.load(i32x16.ir, b.add(tile, b.mul(k, INTP(64))), 64), i16x32.ir) for tile in tiles]
            pairs = [b.bitcast(broadcast(b, self.load(I32, b.add(x, b.mul(k, INTP(4)))), 16), i16x32.ir) for x in xs]
            return [int16_dots(b, s, w[r], pairs[t]) for s, (r, t) in zip(sums, self.pairs)]
        return self.loop(n, [constant([0] * 16)] * len(self.pairs), body)

    def products(self, n_groups, n_pairs):
        """Emit the products of n_groups groups of n_pairs pairs."""
        def group(i, sums):
            dots = self.dots(self.builder.mul(i, n_pairs), n_pairs)
            return [self.builder.fadd(s, self.builder.sitofp(d, f32x16.ir), flags=FAST) for s, d in zip(sums, dots)]
        return self.loop(n_groups, [constant([0.0] * 16, F32)] * len(self.pairs), group)

    def before(self, outs, factors):
        """Emit outputs so far times the tokens' factors, or zeros."""
        def scaled():
            loaded = [(self.load(f32x16.ir, self.cell(outs, r, t)), self.of_token(factors, t)) for r, t in self.pairs]
            return [self.builder.fmul(*pair, flags=FAST) for pair in loaded]
        return self.where_given(factors, scaled)

    def of_token(self, values, t):
        """Emit a token's value of an array, broadcast."""
        return broadcast(self.builder, self.load(F32, self.builder.add(values, INTP(4 * t))), 16)


@intrinsic
def pair_products(typingctx, tiles, tile_bytes, row_scales, n_groups, n_pairs, x, x_row, x_scales, out, out_row, factors):
    """Compute rows of tiles . rows of x, of INT16_ROWS and PAIR_TOKENS.

    *(out + t out_row)[r] = factors[t] *(out + t out_row)[r] + row_scales[r] x_scales[t] (tile row r . x row t), over n_groups groups of
    n_pairs pairs. factors may be 0: there is nothing yet. Arguments are addresses, strides in bytes, and counts.
    """
    def codegen(context, b, signature, args):
        tiles, tile_bytes, row_scales, n_groups, n_pairs, x, x_row, x_scales, out, out_row, factors = args
        emit = _PairEmitter(b, INT16_ROWS, PAIR_TOKENS, tiles, tile_bytes, x, x_row)
        sums = emit.products(n_groups, n_pairs)
        outs = [b.add(out, b.mul(out_row, INTP(t))) for t in range(PAIR_TOKENS)]
        scales = [emit.load(f32x16.ir, b.add(row_scales, INTP(64 * r))) for r in range(INT16_ROWS)]
        for s, before, (r, t) in zip(sums, emit.before(outs, factors), emit.pairs):
            scale = b.fmul(scales[r], emit.of_token(x_scales, t), flags=FAST)
            b.store(b.fadd(before, b.fmul(s, scale, flags=FAST), flags=FAST), pointer(b, emit.cell(outs, r, t), f32x16.ir), align=4)
        return context.get_dummy_value()
    return types.void(*[types.intp] * 11), codegen


@inner
def matmul_pairs(tiles, tile_bytes, row_scales, n_tiles, n_groups, x, x_row, x_scales, n_tokens, out, out_row):
    """Compute rows of n_tiles tiles . n_tokens rows, over groups of 64 values.

    All are padded to INT16_ROWS tiles and PAIR_TOKENS rows, outputs too.
    """
    for i in range(0, n_tiles, INT16_ROWS):
        for t in range(0, n_tokens, PAIR_TOKENS):
            pair_products(tiles + i * tile_bytes, tile_bytes, row_scales + 64 * i, n_groups, 32, x + t * x_row, x_row, x_scales + 4 * t,
                          out + t * out_row + 64 * i, out_row, 0)
