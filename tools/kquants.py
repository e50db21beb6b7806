"""Quantize float32 rows to Q2_K to Q6_K, IQ4_NL and IQ4_XS in numpy.

Scales come from the minimum and maximum of a block. A superblock is 256 numbers:

    Q4_K, Q5_K  8 sub-blocks of 32   x = d*sc*q - dmin*m  sc and m of 6 bits
    Q2_K        16 sub-blocks of 16  x = d*sc*q - dmin*m  sc and m of 4 bits
    Q6_K        16 sub-blocks of 16  x = d*sc*(q - 32)    sc an int8
    Q3_K        16 sub-blocks of 16  x = d*sc*(q - 4)     sc of 6 bits
    IQ4_XS      8 sub-blocks of 32   x = d*sc*table[q]    sc of 6 bits

IQ4_NL has blocks of 32, x = d*table[q]. `gguf.quants.dequantize` reads what is written here.
"""

import numpy as np
from gguf.quants import IQ4_NL

BLOCK = 256
TABLE = np.float32(IQ4_NL.kvalues)


def inverse(x):
    """1/x, and 0 where x is 0, so that a block of zeros gets zeros."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def whole(x, low, high):
    """The nearest integers from low to high."""
    return np.clip(np.rint(x), low, high)


def scaled(x, high):
    """x [n, m] >= 0 as d * integers from 0 to high.

    Returns d [n, 1] in float16, and the integers [n, m].
    """
    d = (x.max(axis=1, keepdims=True) / high).astype(np.float16)
    return d, whole(x * inverse(d.astype(np.float32)), 0, high).astype(np.uint8)


def scaled_signed(x, high):
    """x [n, m] as d * integers from -high to high.

    Returns d [n, 1] in float16, and the integers [n, m].
    """
    d = (np.abs(x).max(axis=1, keepdims=True) / high).astype(np.float16)
    return d, whole(x * inverse(d.astype(np.float32)), -high, high).astype(np.int8)


def peaks(x):
    """The values of largest magnitude along the last axis, signed."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]


def pack_scales(sc, m):
    """Pack the 6-bit sc and m [n, 8] into 12 bytes.

    The high two bits of numbers 4 to 7 are above numbers 0 to 3.
    """
    low, high = slice(0, 4), slice(4, 8)
    return np.concatenate([sc[:, low] | sc[:, high] >> 4 << 6,
                           m[:, low] | m[:, high] >> 4 << 6,
                           sc[:, high] & 15 | (m[:, high] & 15) << 4], axis=1)


def quantize_with_minimum(x, n_bits, n_sub, high):
    """Quantize x [n, 256] with scales and mins.

    Returns d and dmin [n, 1], scales and mins [n, n_sub] up to `high`, and q [n, n_sub, 256 / n_sub] in 0 .. 2**n_bits - 1.
    """
    x = x.reshape(-1, n_sub, BLOCK // n_sub)
    minimum = np.maximum(-x.min(axis=2), 0)
    scale = (np.maximum(x.max(axis=2), 0) + minimum) / (2**n_bits - 1)
    d, sc = scaled(scale, high)
    dmin, m = scaled(minimum, high)
    q = x + (dmin.astype(np.float32) * m)[:, :, None]
    q *= inverse(d.astype(np.float32) * sc)[:, :, None]
    return d, dmin, sc, m, whole(q, 0, 2**n_bits - 1).astype(np.uint8)


def pack_nibbles(q):
    """Pack q [n, 8, 32] into [n, 128] bytes.

    Sub-block 2i has the low and 2i + 1 the high nibbles of 32 bytes.
    """
    return (q[:, 0::2] & 15 | q[:, 1::2] << 4).reshape(len(q), 128)


def quantize_q4_k(x):
    """x [n, 256] -> [n, 144] bytes."""
    d, dmin, sc, m, q = quantize_with_minimum(x, 4, 8, 63)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), pack_scales(sc, m), pack_nibbles(q)], axis=1)


def quantize_q5_k(x):
    """x [n, 256] -> [n, 176] bytes.

    The fifth bits of sub-block j are bit j of 32 bytes.
    """
    d, dmin, sc, m, q = quantize_with_minimum(x, 5, 8, 63)
    fifth = np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), pack_scales(sc, m), fifth, pack_nibbles(q)], axis=1)


def pack_pairs(q):
    """Pack q [n, 256] of two bits into [n, 64] bytes.

    Bits 2k of byte 32i + j are number 128i + 32k + j.
    """
    q = q.reshape(-1, 2, 4, 32)
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def quantize_q2_k(x):
    """x [n, 256] -> [n, 84] bytes."""
    d, dmin, sc, m, q = quantize_with_minimum(x, 2, 16, 15)
    return np.concatenate([sc | m << 4, pack_pairs(q), d.view(np.uint8), dmin.view(np.uint8)], axis=1)


def quantize_q3_k(x):
    """x [n, 256] -> [n, 110] bytes.

    The third bits of 32 numbers are one bit of 32 bytes. The upper two bits of the scales come last.
    """
    x = x.reshape(-1, 16, 16)
    d, sc = scaled_signed(peaks(x) / -4, 31)
    q = (whole(x * inverse(d.astype(np.float32) * sc)[:, :, None], -4, 3) + 4).astype(np.uint8)
    third = np.packbits(q.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little")[:, 0]
    sc = (sc + 32).astype(np.uint8).reshape(-1, 4, 4)
    low = (sc[:, :2] & 15 | (sc[:, 2:] & 15) << 4).reshape(-1, 8)
    high = sc[:, 0] >> 4 | sc[:, 1] >> 4 << 2 | sc[:, 2] >> 4 << 4 | sc[:, 3] >> 4 << 6
    return np.concatenate([third, pack_pairs(q & 3), low, high, d.view(np.uint8)], axis=1)


def quantize_q6_k(x):
    """x [n, 256] -> [n, 210] bytes."""
    x = x.reshape(-1, 16, 16)
    d, sc = scaled_signed(peaks(x) / -32, 127)      # the value of largest magnitude maps to -32, so that all 64 values are used
    q = whole(x * inverse(d.astype(np.float32) * sc)[:, :, None], -32, 31)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | q[:, :, 2:] << 4
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    n = len(x)
    return np.concatenate([low.reshape(n, 128), high.reshape(n, 64), sc.view(np.uint8), d.view(np.uint8)], axis=1)


def nearest(x):
    """The nearest entries of TABLE to x [n, m, 32], as nibbles [n, m, 16].

    Entries j and j + 16 share a byte.
    """
    q = np.searchsorted((TABLE[1:] + TABLE[:-1]) / 2, x).astype(np.uint8)
    return q[:, :, :16] | q[:, :, 16:] << 4


def quantize_iq4_nl(x):
    """x [n, 32] -> [n, 18] bytes.

    The value of largest magnitude maps to the table's, -127.
    """
    d = (peaks(x)[:, None] / TABLE[0]).astype(np.float16)
    return np.concatenate([d.view(np.uint8), nearest((x * inverse(d.astype(np.float32)))[:, None])[:, 0]], axis=1)


def quantize_iq4_xs(x):
    """x [n, 256] -> [n, 136] bytes."""
    x = x.reshape(-1, 8, 32)
    d, sc = scaled_signed(peaks(x) / TABLE[0], 31)
    q = nearest(x * inverse(d.astype(np.float32) * sc)[:, :, None])
    sc = (sc + 32).astype(np.uint8)
    high = (sc.astype(np.uint16) >> 4 << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, keepdims=True, dtype="<u2")
    return np.concatenate([d.view(np.uint8), high.view(np.uint8), sc[:, ::2] & 15 | (sc[:, 1::2] & 15) << 4, q.reshape(-1, 128)], axis=1)


QUANTIZERS = {"Q2_K": quantize_q2_k, "Q3_K": quantize_q3_k, "Q4_K": quantize_q4_k, "Q5_K": quantize_q5_k, "Q6_K": quantize_q6_k,
              "IQ4_NL": quantize_iq4_nl, "IQ4_XS": quantize_iq4_xs}
