"""Frames of stages: what is written is read, damage is refused, and nothing is allocated for it."""
import struct
import tracemalloc

import numpy as np
import pytest
from helpers import rng

from pydsa.sampling import Picked
from pydsa.stages import wire
from pydsa.stages.wire import (DISCARD, HOST, Beat, Close, Credit, Drop, Follow, FrameError, Limits, Message, Part, Result, Step, decode,
                               encode, from_bfloat16, of_outputs, to_bfloat16)

LIMITS = Limits(n_tokens=8, n_embd=5, n_vocab=300, n_ctx=64)
ROWS = rng(3).standard_normal((3, 5)).astype(np.float32)
IDS = np.array([0, 299, 7], np.int32)
STEP = Step(3, 2**40, "sparse", [Part(2**31 - 1, 10, 2), Part(7, 0, 1)], [HOST, 5, DISCARD], IDS, ROWS, Follow(2**41, "dense"))
RESULT = Result(1, 9, True, [Picked(3, 1.5, -2.25), None], rng(4).standard_normal((1, 300)).astype(np.float32))
FRAMES = {"step": STEP, "step of ids": STEP._replace(rows=None, follow=None),
          "step in float64": STEP._replace(rows=ROWS.astype(np.float64)), "step without outputs": STEP._replace(samplers=[]),
          "result": RESULT,
          "result without outputs": Result(1, 9, False, [], np.empty((0, 300), np.float32)), "beat": Beat(1, 4, True, 0.25, 12.5, 2**40),
          "credit": Credit(1, 4, Follow(5, "mha")), "close": Close(1, 4), "drop": Drop(2, 5),
          "ask": Message("ask", 1, 4, {"do": "stored", "n": [1, None, "ä"]}, b"\x00\xff"), "hello": Message("hello", 1, 0, {})}


def joined(frame, **options):
    return b"".join(bytes(part) for part in encode(frame, **options))


def same(a, b):
    """Whether two frames are equal, arrays bit for bit."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bytes(a) == bytes(b) if isinstance(b, memoryview) else a == b


@pytest.mark.parametrize("name", FRAMES)
def test_frames_come_back(name):
    assert same(FRAMES[name], decode(joined(FRAMES[name]), LIMITS))


def test_positions_are_those_of_the_parts():
    assert STEP.positions.tolist() == [10, 11, 0]


@pytest.mark.parametrize("n, parts, ids", [(3, STEP.parts, [0, 299, 7]), (2, [Part(2**31 - 1, 11, 1), Part(7, 0, 1)], [299, 7]),
                                           (1, [Part(7, 0, 1)], [7])])
def test_outputs_are_the_last_tokens(n, parts, ids):
    step = of_outputs(STEP._replace(samplers=[HOST] * n), ROWS[-n:])
    assert step.parts == parts and step.ids.tolist() == ids and same(step.rows, ROWS[-n:])
    assert same(step, decode(joined(step), LIMITS))


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_cut_or_too_long_is_refused(name):
    data = joined(FRAMES[name])
    free = isinstance(FRAMES[name], Message)        # what follows is its payload
    for n in range(len(data) - 2 * free):
        with pytest.raises(FrameError, match="frame"):
            decode(data[:n], LIMITS)
    if not free:
        with pytest.raises(FrameError, match="1 bytes too many"):
            decode(data + b"\x00", LIMITS)


def test_random_damage_is_refused_or_harmless():
    """There is a frame within the limits, or a FrameError. Hardly any memory is taken."""
    random = rng(5)
    tracemalloc.start()
    refused = 0
    for data in map(joined, FRAMES.values()):
        for _ in range(200):
            damaged = bytearray(data)
            for at in random.integers(0, min(len(data), 80), random.integers(1, 4)):
                damaged[at] = random.integers(0, 256)
            try:
                frame = decode(damaged, LIMITS)
            except FrameError:
                refused += 1
                continue
            if isinstance(frame, Step):
                assert 0 < sum(part.n_tokens for part in frame.parts) == len(frame.ids) <= 8 and len(frame.samplers) <= len(frame.ids)
                assert all(part.n_past + part.n_tokens <= 64 for part in frame.parts) and 0 <= frame.ids.min() <= frame.ids.max() < 300
                assert frame.rows is None or frame.rows.shape == (len(frame.ids), 5)
            if isinstance(frame, Result):
                assert frame.logits.shape[1] == 300 and len(frame.logits) <= len(frame.picked) <= 8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 500 and peak < 1 << 20


def changed(frame, **fields):
    return joined(frame._replace(**fields))


@pytest.mark.parametrize("data, words", [
    (changed(STEP, ids=np.array([0, 300, 7], np.int32)), "300 as greatest token id, expected 0 to 299"),
    (changed(STEP, ids=np.array([0, -1, 7], np.int32)), "-1 as least token id"),
    (changed(STEP, parts=[Part(1, 63, 2), Part(2, 0, 1)]), "65 tokens up to a part's end, expected 0 to 64"),
    (changed(STEP, parts=[Part(1, 0, 2), Part(2, 0, 2)]), "4 tokens in its parts, expected 3 to 3"),
    (changed(STEP, parts=[Part(1, 0, 3), Part(2, 0, 0)]), "0 tokens in a part, expected 1 to 3"),
    (changed(STEP, parts=[]), "0 parts, expected 1 to 6"),
    (changed(STEP, samplers=[HOST] * 4), "4 outputs, expected 0 to 3"),
    (changed(STEP, rows=ROWS[:, :4]), "4 columns, expected 5 to 5"),
    (changed(STEP, ids=np.zeros(9, np.int32), parts=[Part(1, 0, 9)]), "9 tokens, expected 1 to 8"),
    (changed(RESULT, logits=RESULT.logits[:, :299]), "299 as vocabulary"),
    (changed(RESULT, picked=[Picked(300, 1.0, 0.0), None]), "300 as token id"),
    (joined(Message("ask", 1, 4, {}))[:16] + struct.pack("<I", 2**32 - 1), "4294967295 bytes of JSON, expected 0 to 16777216"),
    (joined(Message("ask", 1, 4, {}))[:16] + struct.pack("<I", 2) + b"[]", "expected an object"),
    (joined(Message("ask", 1, 4, {}))[:16] + struct.pack("<I", 100000) + b"[" * 100000, "no JSON"),
    (joined(Message("ask", 1, 4, {}))[:16] + struct.pack("<I", 2) + b"\xff\xfe", "no JSON"),
    (b"\xff" + joined(Close(1, 4))[1:], "kind 255"),
    (b"\x04\x02" + joined(Close(1, 4))[2:], "version 2, expected 1: all stages must run the same version")])
def test_what_contradicts_is_refused(data, words):
    with pytest.raises(FrameError, match=words):
        decode(data, LIMITS)


def test_a_payload_has_a_limit(monkeypatch):
    monkeypatch.setattr(wire, "MOST_PAYLOAD", 8)
    with pytest.raises(FrameError, match="9 bytes of payload"):
        decode(joined(Message("ask", 1, 4, {}, bytes(9))), LIMITS)


def test_a_frame_is_never_longer_than_the_limit_says():
    step = Step(0, 1, "dense", [Part(i, 0, 1) for i in range(8)], [HOST] * 8, np.zeros(8, np.int32), np.zeros((8, 5)))
    assert len(joined(step)) <= LIMITS.most
    wide = Limits(n_tokens=8, n_embd=10**6, n_vocab=10**6, n_ctx=64)
    assert len(joined(step)) - 8 * 5 * 8 + 8 * 8 * 10**6 <= wide.most
    result = Result(0, 1, False, [None] * 8, np.zeros((8, 10**6), np.float32))
    assert len(joined(result)) <= wide.most_result


def test_bfloat16_rounds_to_nearest_even():
    pairs = [(1, 1), (1 + 2**-8, 1), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7), (-1 - 2**-8, -1), (0, 0), (-0.0, -0.0),
             (3.4e38, np.inf), (np.inf, np.inf), (-np.inf, -np.inf), (np.nan, np.nan), (1e-40, 1e-40)]
    values, expected = np.array(pairs, np.float32).T
    met = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(met[:-1], expected[:-1])
    assert np.signbit(met[6]) and abs(met[-1] - 1e-40) <= 2.0**-134
    every = from_bfloat16(np.arange(2**16, dtype=np.uint16))
    np.testing.assert_array_equal(to_bfloat16(every)[~np.isnan(every)], np.arange(2**16)[~np.isnan(every)])
    assert np.isnan(from_bfloat16(to_bfloat16(every[np.isnan(every)]))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bf16_halves_what_passes(dtype):
    frame = decode(joined(STEP._replace(rows=ROWS.astype(dtype)), wire="bf16"), LIMITS)
    np.testing.assert_array_equal(frame.rows, from_bfloat16(to_bfloat16(ROWS)))
    assert len(joined(STEP, wire="bf16")) == len(joined(STEP)) - ROWS.nbytes // 2
