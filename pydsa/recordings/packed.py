"""Choices of keys, packed: a bit for each key, without the bytes that are 0.

A row of up to k keys out of n takes n / 64 bytes, and one for each byte of its bits that is not 0.
"""
import numpy as np

AT_ONCE = 1 << 25       # keys of the rows that are packed or unpacked together, a byte each


def pack(rows, n_keys):
    """Pack rows of keys -> (map, bits).

    rows: integers [n, k], each from -1, no key, to n_keys - 1, and different. map: uint8 [n, ceil(n_keys / 64)], a bit for each byte of a
    row's bits: whether it is not 0. bits: uint8, those bytes, row by row. Bit i of a byte is the i-th lowest.
    """
    width, n_at_once = 64 * -(-n_keys // 64), max(1, AT_ONCE // (n_keys + 72))
    maps, bits = [np.empty((0, width // 64), np.uint8)], [np.empty(0, np.uint8)]
    for start in range(0, len(rows), n_at_once):
        some = rows[start:start + n_at_once]
        chosen = np.zeros((len(some), width + 8), np.bool_)        # eight columns more: -1 falls into the first eight
        first = np.arange(len(some))[:, None] * (width + 8) + 8
        chosen.ravel()[(some + first).ravel()] = True
        packed = np.packbits(chosen[:, 8:], axis=1, bitorder="little")
        maps.append(np.packbits(packed != 0, axis=1, bitorder="little"))
        bits.append(packed[packed != 0])
    return np.concatenate(maps), np.concatenate(bits)


def n_bytes(maps):
    """How many bytes of bits belong to each of some maps.

    maps: uint8 [..., n, w] -> int64 [...].
    """
    return np.unpackbits(maps, axis=-1).sum((-2, -1), np.int64)


def unpack(maps, bits, k):
    """The rows of pack(), int32 [n, k], ascending, -1 at the end.

    Raises ValueError if a row has more than k keys, or maps and bits do not belong together.
    """
    rows, at, n_at_once = np.full((len(maps), k), -1, np.int32), 0, max(1, AT_ONCE // (64 * maps.shape[1] + 1))
    for start in range(0, len(maps), n_at_once):
        there = np.unpackbits(maps[start:start + n_at_once], axis=1, bitorder="little").astype(np.bool_)
        n, packed = np.count_nonzero(there), np.zeros(there.shape, np.uint8)
        if n > len(bits) - at:
            raise ValueError("bits are missing")
        packed[there] = bits[at:at + n]
        at += n
        token, key = np.divmod(np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_)), max(1, 8 * packed.shape[1]))
        counts = np.bincount(token, minlength=len(there))
        if counts.max(initial=0) > k:
            raise ValueError("a row has too many keys")
        rows[start + token, np.arange(token.size) - np.repeat(np.cumsum(counts) - counts, counts)] = key
    if at != len(bits):
        raise ValueError("there are bits without a row")
    return rows
