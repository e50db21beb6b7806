"""Frames: what stages and their driver send each other, as bytes.

A frame is a fixed header and what it announces. Every number in it is checked before it is used, so that a damaged or hostile frame is
refused with a sentence, and takes no memory. Nothing is unpickled. Numbers are little-endian.
"""
import json
import struct
from typing import NamedTuple

import numpy as np

from pydsa.errors import StageError
from pydsa.executor.schedule import VARIANTS
from pydsa.sampling import Picked

VERSION = 1
WIRES = ("f32", "bf16")         # how hidden rows pass: as they are, float32 or the reference's float64, or as bfloat16
HOST, DISCARD = 0, 2**32 - 1    # in place of a sampler: the logits are wanted, or nothing
MOST_JSON = 1 << 24             # bytes
MOST_PAYLOAD = 1 << 24          # bytes of cache rows in a frame
MOST_SESSIONS = 1 << 31
_NAMES = tuple(VARIANTS)
_HEAD = struct.Struct("<BBxxIQ")        # kind, version, epoch, number
_STEP = struct.Struct("<BBBxIIIIQ")     # variant, type of rows, variant of the step that may follow; parts, tokens, outputs, width; number
_RESULT = struct.Struct("<BxxxIII")     # whether the next step was started; outputs, rows of logits, width
_BEAT = struct.Struct("<BxxxxxxxddQ")   # what it does, since when, CPU seconds, page faults
_CREDIT = struct.Struct("<QB")          # the number that the next step gets, its variant
_LENGTH = struct.Struct("<I")
_PICKS = np.dtype([("token", "<i4"), ("greatest", "<f8"), ("least", "<f8")])
_ROWS = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<u2")}
_TYPE = {"float32": 1, "float64": 2}
_BFLOAT16 = 3


class FrameError(StageError):
    """A frame is damaged, or no frame at all."""


class Limits(NamedTuple):
    """What no frame of a model may exceed.

    n_tokens: those of a step. n_embd: the width of hidden rows. n_vocab, n_ctx: as in the model's Setup.
    """
    n_tokens: int
    n_embd: int
    n_vocab: int
    n_ctx: int

    @classmethod
    def of(cls, setup):
        """Those of a Setup, of a whole model or a stage."""
        return cls(setup.n_ubatch, setup.config.n_embd, setup.config.n_vocab, setup.n_ctx)

    @property
    def most(self):
        """Bytes of the longest frame for a stage."""
        return max(_HEAD.size + _STEP.size + self.n_tokens * (2 * 12 + 4 + 4 + 8 * self.n_embd), MOST_JSON + MOST_PAYLOAD + 64)

    @property
    def most_result(self):
        """Bytes of the longest frame for the driver."""
        return max(_HEAD.size + _RESULT.size + self.n_tokens * (_PICKS.itemsize + 4 * self.n_vocab), MOST_JSON + MOST_PAYLOAD + 64)


class Part(NamedTuple):
    """Tokens of one session in a step, at positions n_past, n_past + 1, ..."""
    session: int
    n_past: int
    n_tokens: int


def after(parts):
    """The parts of the step that comes next: a token of each session.

    parts: tuples of a session, n_past and n_tokens, of one output each.
    """
    return [Part(session, n_past + n_tokens, 1) for session, n_past, n_tokens in parts]


def of_outputs(step, rows):
    """The Step of the outputs of another alone, its last tokens.

    rows: their hidden rows.
    """
    left, parts = len(step.samplers), []
    for session, n_past, n_tokens in reversed(step.parts):
        n = min(left, n_tokens)
        if n:
            parts.append(Part(session, n_past + n_tokens - n, n))
        left -= n
    return step._replace(parts=parts[::-1], ids=step.ids[len(step.ids) - len(step.samplers):], rows=rows)


class Follow(NamedTuple):
    """The step that the stage with the head may start by itself."""
    number: int
    variant: str


class Step(NamedTuple):
    """A step: what a stage gets, and gives to the next.

    parts: of Part. samplers: for each output a sampler's number, HOST or DISCARD. ids: int32 [n_tokens]. rows: hidden rows [n_tokens,
    n_embd], float32 or float64; None for the first stage's layers. follow: a Follow, or None.
    """
    epoch: int
    number: int
    variant: str
    parts: list
    samplers: list
    ids: np.ndarray
    rows: np.ndarray | None = None
    follow: Follow | None = None

    @property
    def positions(self):
        """Those of the tokens, int64 [n_tokens]."""
        return np.concatenate([np.arange(n_past, n_past + n) for _, n_past, n in self.parts])


class Result(NamedTuple):
    """What the stage with the head tells of a step.

    Of one without outputs the last stage tells.

    picked: for each output a sampling.Picked, or None. logits: float32 [n, n_vocab], those of the outputs that have none, in order.
    followed: whether the step that may follow was started.
    """
    epoch: int
    number: int
    followed: bool
    picked: list
    logits: np.ndarray


class Beat(NamedTuple):
    """A heartbeat: what a stage does, and what it has used.

    busy: whether a step, `number`, or a request is under way, for `seconds`. cpu: seconds, of all its threads. faults: page faults.
    """
    epoch: int
    number: int
    busy: bool
    seconds: float
    cpu: float
    faults: int


class Credit(NamedTuple):
    """The stage with the head may start a step after the step `number`."""
    epoch: int
    number: int
    follow: Follow


class Close(NamedTuple):
    """A session ends; number: that of the session."""
    epoch: int
    number: int


class Drop(NamedTuple):
    """A sampler ends; number: that of the sampler."""
    epoch: int
    number: int


class Message(NamedTuple):
    """Anything that is no part of a step, as JSON, with bytes.

    kind: one of the names of MESSAGES. content: a dict. payload: bytes-like.
    """
    kind: str
    epoch: int
    number: int
    content: dict
    payload: bytes = b""


MESSAGES = ("hello", "sampler", "ask", "answer", "failed")
_KINDS = (Step, Result, Beat, Credit, Close, Drop, *MESSAGES)


def to_bfloat16(rows):
    """Rows as bfloat16, in uint16, rounded to the nearest.

    Of two that are as near it is the even one. rows: float32 or float64. NaN stays NaN.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    bits = rows.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7fff) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(rows)] = 0x7fc0
    return rounded


def from_bfloat16(rows):
    """float32 of bfloat16, uint16."""
    return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(frame, wire="f32"):
    """A frame as two bytes-like objects, which are sent one after the other.

    wire: one of WIRES. The second has hidden rows, logits or cache rows, and may be an array of the caller's.
    """
    if isinstance(frame, Message):
        content = json.dumps(frame.content).encode()
        return _head(frame.kind, frame) + _LENGTH.pack(len(content)) + content, frame.payload
    head = _head(type(frame), frame)
    if isinstance(frame, Step):
        return _encode_step(head, frame, wire)
    if isinstance(frame, Result):
        table = np.array([one or Picked(-1, 0.0, 0.0) for one in frame.picked], _PICKS)
        logits = np.ascontiguousarray(frame.logits, "<f4")
        n_logits, n_vocab = logits.shape
        return head + _RESULT.pack(frame.followed, len(table), n_logits, n_vocab) + table.tobytes(), logits
    if isinstance(frame, Beat):
        return head + _BEAT.pack(frame.busy, frame.seconds, frame.cpu, frame.faults), b""
    if isinstance(frame, Credit):
        return head + _CREDIT.pack(frame.follow.number, _NAMES.index(frame.follow.variant)), b""
    return head, b""


def _head(kind, frame):
    return _HEAD.pack(_KINDS.index(kind), VERSION, frame.epoch, frame.number)


def _encode_step(head, step, wire):
    rows, kind, width = b"", 0, 0
    if step.rows is not None:
        rows, width = np.ascontiguousarray(step.rows), step.rows.shape[1]
        kind = _TYPE[rows.dtype.name]
        if wire == "bf16":
            rows, kind = to_bfloat16(rows), _BFLOAT16
    number, variant = step.follow or (0, step.variant)
    head += _STEP.pack(_NAMES.index(step.variant), kind, _NAMES.index(variant), len(step.parts), len(step.ids), len(step.samplers), width,
                       number)
    return head + np.array([*step.parts], "<u4").tobytes() + np.array(step.samplers, "<u4").tobytes() + np.asarray(
        step.ids, "<i4").tobytes(), rows


def decode(data, limits):
    """The frame of some bytes: a Step, Result, Beat, Credit, Close, Drop or Message.

    data: bytes-like, which arrays of the frame share. limits: Limits. Raises FrameError for anything else.
    """
    reader = _Reader(data)
    kind, version, epoch, number = reader.unpack(_HEAD)
    if version != VERSION:
        raise FrameError(f"a frame has version {version}, expected {VERSION}: all stages must run the same version of pydsa")
    if kind >= len(_KINDS):
        raise FrameError(f"a frame is of kind {kind}, expected less than {len(_KINDS)}")
    kind = _KINDS[kind]
    frame = _DECODERS[kind](reader, limits, epoch, number) if kind in _DECODERS else _decode_message(reader, kind, epoch, number)
    reader.end()
    return frame


class _Reader:
    """Takes parts of a frame, none of which may end beyond it."""

    def __init__(self, data):
        self._data, self._at = memoryview(data).cast("B"), 0

    def take(self, n):
        """The next n bytes."""
        left = len(self._data) - self._at
        if n > left:
            raise FrameError(f"a frame ends {n - left} bytes too early")
        self._at += n
        return self._data[self._at - n:self._at]

    def unpack(self, form):
        return form.unpack(self.take(form.size))

    def array(self, dtype, *shape):
        dtype = np.dtype(dtype)
        n = dtype.itemsize
        for size in shape:
            n *= size
        return np.frombuffer(self.take(n), dtype).reshape(shape)

    def rest(self):
        return self.take(len(self._data) - self._at)

    def end(self):
        """Raise FrameError if anything is left."""
        if self._at < len(self._data):
            raise FrameError(f"a frame has {len(self._data) - self._at} bytes too many")


def _check(what, met, most, least=0):
    if not least <= met <= most:
        raise FrameError(f"a frame has {met} {what}, expected {least} to {most}")


def _variant(i):
    _check("as variant", i, len(_NAMES) - 1)
    return _NAMES[i]


def _decode_step(reader, limits, epoch, number):
    variant, kind, next_variant, n_parts, n_tokens, n_outputs, width, follow = reader.unpack(_STEP)
    _check("tokens", n_tokens, limits.n_tokens, 1)
    _check("parts", n_parts, 2 * n_tokens, 1)
    _check("outputs", n_outputs, n_tokens)
    if kind not in (0, *_ROWS):
        raise FrameError(f"a frame has rows of type {kind}, expected 0 to {max(_ROWS)}")
    _check("columns", width, *[limits.n_embd if kind else 0] * 2)
    parts = [Part(*part) for part in reader.array("<u4", n_parts, 3).tolist()]
    for part in parts:
        _check("tokens in a part", part.n_tokens, n_tokens, 1)
        _check("tokens up to a part's end", part.n_past + part.n_tokens, limits.n_ctx)
    _check("tokens in its parts", sum(part.n_tokens for part in parts), n_tokens, n_tokens)
    samplers = reader.array("<u4", n_outputs).tolist()
    ids = reader.array("<i4", n_tokens)
    _check("as least token id", int(ids.min()), limits.n_vocab - 1)
    _check("as greatest token id", int(ids.max()), limits.n_vocab - 1)
    rows = reader.array(_ROWS[kind], n_tokens, width) if kind else None
    return Step(epoch, number, _variant(variant), parts, samplers, ids, from_bfloat16(rows) if kind == _BFLOAT16 else rows,
                Follow(follow, _variant(next_variant)) if follow else None)


def _decode_result(reader, limits, epoch, number):
    followed, n_outputs, n_logits, n_vocab = reader.unpack(_RESULT)
    _check("outputs", n_outputs, limits.n_tokens)
    _check("as vocabulary", n_vocab, limits.n_vocab, limits.n_vocab)
    table = reader.array(_PICKS, n_outputs)
    _check("rows of logits", n_logits, n_outputs)
    picked = [None if token < 0 else Picked(token, greatest, least) for token, greatest, least in table.tolist()]
    for one in picked:
        _check("as token id", one.token if one else 0, limits.n_vocab - 1)
    return Result(epoch, number, bool(followed), picked, reader.array("<f4", n_logits, n_vocab))


def _decode_beat(reader, limits, epoch, number):
    busy, seconds, cpu, faults = reader.unpack(_BEAT)
    return Beat(epoch, number, bool(busy), seconds, cpu, faults)


def _decode_credit(reader, limits, epoch, number):
    following, variant = reader.unpack(_CREDIT)
    return Credit(epoch, number, Follow(following, _variant(variant)))


def _decode_message(reader, kind, epoch, number):
    length, = reader.unpack(_LENGTH)
    _check("bytes of JSON", length, MOST_JSON)
    try:
        content = json.loads(bytes(reader.take(length)))
    except (ValueError, RecursionError) as error:       # a UnicodeDecodeError is a ValueError
        raise FrameError(f"a frame of kind {kind!r} holds no JSON ({error!r:.80})") from error
    if not isinstance(content, dict):
        raise FrameError(f"a frame of kind {kind!r} holds {content!r:.80}, expected an object")
    payload = reader.rest()
    _check("bytes of payload", len(payload), MOST_PAYLOAD)
    return Message(kind, epoch, number, content, payload)


_DECODERS = {Step: _decode_step, Result: _decode_result, Beat: _decode_beat, Credit: _decode_credit,
             Close: lambda reader, limits, epoch, number: Close(epoch, number),
             Drop: lambda reader, limits, epoch, number: Drop(epoch, number)}
