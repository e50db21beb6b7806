"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: 4-bit indices into a table of sixteen int8.

Byte permutes (prmt) do the lookup.
"""
import numpy as np

from pydsa.backends.cuda.blocks.block import ZERO, any_four_u32, entry
from pydsa.backends.cuda.intrinsics.device import bits_float, byte_at, device, half_at, permuted, u32_at
from pydsa.quants import IQ4_LEVELS, MXFP4_LEVELS, TYPES


IQ4_NL, IQ4_XS, MXFP4, NVFP4 = (TYPES[name].n_bytes for name in ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"))      # bytes of a block


def _packed(levels):
    """Sixteen int8 as four uint32."""
    return tuple(np.array(levels, np.int8).view(np.uint32))


HALF_OF_E4M3 = np.float32(2.0**119)      # times a float32 of these bits: their exponent's bias is 7, not 127
IQ4_TABLE, MXFP4_TABLE = _packed(IQ4_LEVELS), _packed(MXFP4_LEVELS)


@device
def four_looked_up(table, nibbles):
    """Table entries for the four lowest nibbles of a uint32."""
    low, high = permuted(table[0], table[1], np.uint32(nibbles & 0x7777)), permuted(table[2], table[3], np.uint32(nibbles & 0x7777))
    return permuted(low, high, np.uint32(0x3210 | (nibbles & 0x8888) >> 1))


@device
def looked_up(table, nibbles):
    """Table entries for the low nibbles of four bytes, and for the high ones."""
    first, second = four_looked_up(table, nibbles), four_looked_up(table, nibbles >> 16)
    return permuted(first, second, np.uint32(0x6420)), permuted(first, second, np.uint32(0x7531))


@device
def all_looked_up(table, a, b, c, e):
    """Table entries for the low and then the high nibbles of four uint32."""
    a, f = looked_up(table, a)
    b, h = looked_up(table, b)
    c, i = looked_up(table, c)
    e, j = looked_up(table, e)
    return a, b, c, e, f, h, i, j


@device
def group_iq4_nl(data, row, g):
    """Group g of an IQ4_NL row."""
    at = row + IQ4_NL * g
    a, b, c, e = any_four_u32(data, at + 2)
    d = half_at(data, at)
    a, b, c, e, f, h, i, j = all_looked_up(IQ4_TABLE, a, b, c, e)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def scales_iq4_xs(data, row, g):
    """The scales of group g of an IQ4_XS row."""
    at, s = row + IQ4_XS * (g >> 3), g & 7
    low = byte_at(data, at + 4 + s // 2) >> (4 * (s % 2)) & 15
    high = (byte_at(data, at + 2) | byte_at(data, at + 3) << 8) >> (2 * s) & 3
    scale = np.float32(np.int32((low | high << 4) - 32))
    return half_at(data, at), scale, scale


@device
def group_iq4_xs(data, row, g):
    """Group g of an IQ4_XS row."""
    d, scale, _ = scales_iq4_xs(data, row, g)
    d, q = d * scale, row + IQ4_XS * (g >> 3) + 8 + 16 * (g & 7)
    a, b, c, e = u32_at(data, q), u32_at(data, q + 4), u32_at(data, q + 8), u32_at(data, q + 12)
    a, b, c, e, f, h, i, j = all_looked_up(IQ4_TABLE, a, b, c, e)
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def half_of_power(exponent):
    """2^(exponent - 128) for an exponent from 0 to 255. Subnormal for 0 and 1."""
    return bits_float(np.uint32((exponent - 1) << 23 if exponent > 1 else 0x200000 << exponent))


@device
def group_mxfp4(data, row, g):
    """Group g of an MXFP4 row."""
    at = row + MXFP4 * g
    a, b, c, e = any_four_u32(data, at + 1)
    a, b, c, e, f, h, i, j = all_looked_up(MXFP4_TABLE, a, b, c, e)
    d = half_of_power(byte_at(data, at))
    return a, b, c, e, f, h, i, j, d, d, ZERO, ZERO


@device
def half_of_e4m3(byte):
    """Half of an unsigned E4M3, four bits of exponent and three of mantissa.

    The byte 127 is zero. The highest bit of others does not count.
    """
    return bits_float(np.uint32((byte & 127) << 20 if byte != 127 else 0)) * HALF_OF_E4M3


@device
def scales_nvfp4(data, row, g):
    """The scales of group g of an NVFP4 row. Its blocks have no factor."""
    at = row + NVFP4 * (g >> 1) + 2 * (g & 1)
    return np.float32(1), half_of_e4m3(byte_at(data, at)), half_of_e4m3(byte_at(data, at + 1))


@device
def group_nvfp4(data, row, g):
    """Group g of an NVFP4 row: half a block, with scales of 16 weights."""
    q, (_, s, s1) = row + NVFP4 * (g >> 1) + 4 + 16 * (g & 1), scales_nvfp4(data, row, g)
    a, b, c, e = u32_at(data, q), u32_at(data, q + 4), u32_at(data, q + 8), u32_at(data, q + 12)
    a, b, c, e, f, h, i, j = all_looked_up(MXFP4_TABLE, a, b, c, e)
    return a, b, f, h, c, e, i, j, s, s1, ZERO, ZERO


GROUPED = {"IQ4_NL": entry("IQ4_NL", group_iq4_nl), "IQ4_XS": entry("IQ4_XS", group_iq4_xs, scales=scales_iq4_xs),
           "MXFP4": entry("MXFP4", group_mxfp4), "NVFP4": entry("NVFP4", group_nvfp4, scales=scales_nvfp4)}
