"""Arrays as text inside a page: bytes compressed by zlib, in base64, and JSON that HTML cannot misread."""
import base64
import json
import zlib

import numpy as np

LEVELS = 63     # of a share: it is stored as the nearest of (0 to 63)^2 / 63^2
STEPS = 65535   # of a sum of shares


def block(data):
    """Bytes or an array as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(data).tobytes(), 6)).decode()


def planes(values):
    """Integers from 0 to 2^24 - 1 -> as many blocks as they have bytes.

    The first has the low byte of each. Bytes of one kind beside each other take less when compressed.
    """
    values = np.asarray(values, np.uint32)
    n = 1 + (values.size > 0 and int(values.max()) >= 1 << 8) + (values.size > 0 and int(values.max()) >= 1 << 16)
    return [block((values >> 8 * i).astype(np.uint8)) for i in range(n)]


def steps(chosen):
    """Choices [..., k], ascending, -1 at the end -> steps from key to key.

    The first step is from -1; at the end of a row they are 0.
    """
    before = np.concatenate([np.full_like(chosen[..., :1], -1), chosen[..., :-1]], axis=-1)
    return np.where(chosen >= 0, chosen - before, 0)


def share_levels(values):
    """Shares from 0 to 1 as uint8, 0 to LEVELS."""
    return np.rint(np.sqrt(values) * LEVELS).astype(np.uint8)


def sums(values):
    """Sums from 0 on -> {"scale", "planes"}: scale (v / STEPS)^2 of each."""
    scale = float(values.max(initial=0))
    return {"scale": scale, "planes": planes(np.rint(np.sqrt(values / (scale or 1)) * STEPS))}


def spans(positions):
    """Ascending integers as [first, last] of each run of neighbours."""
    positions = np.asarray(positions)
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    return [[int(positions[start]), int(positions[end - 1])] for start, end in zip(starts, [*starts[1:], len(positions)])]


def json_for_html(value):
    """JSON that is safe inside of a script element: no <, >, & and no line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
