"""Worker: what the process of a stage runs.

It receives steps, runs them on its Stage, and sends what comes out to the next one; behind the last is the first, if that has the head. The
stage with the head samples, tells the driver, and may start the next step by itself, at the first stage. The driver (pipeline.py) hears a
heartbeat each second.
"""
import contextlib
import queue
import threading
import time
import traceback

import numpy as np

from pydsa.errors import OutOfMemoryError, PydsaError, StageError
from pydsa.executor.graph import CacheRef
from pydsa.sampling import Picked, Sampler
from pydsa.stages import keeping
from pydsa.stages.channel import ChannelError, Door, Outbox, connect
from pydsa.stages.saves import Logs
from pydsa.stages.wire import (DISCARD, MOST_PAYLOAD, Beat, Close, Credit, Drop, FrameError, Message, Result, Step, after, decode,
                               encode, of_outputs)

BEAT = 1.0              # seconds between heartbeats
ORPHANED = 3600.0       # seconds without a driver after which a worker ends: while another stage is started again there is none
MOST_CREDITS = 1024     # that are kept: those that came too late are never used
CONNECTING = 10.0       # seconds in which the next stage must answer
HANDSHAKES = 5.0        # seconds beside these
OUTPUTS = object()      # in the inbox
CONTROL, STEPS = "control", "steps"     # what a connection is for: the driver's talk with each stage, and what goes from stage to stage


class Worker:
    """Runs a stage.Stage for a driver.

    limits: wire.Limits of the whole model. host: the address at which it listens. wire: how it sends hidden rows, one of wire.WIRES. The
    key of all connections comes with join(). orphaned: whether it ends where it has had no driver for long; not where others see to that.
    Raises StageError if it cannot listen there.
    """

    def __init__(self, stage, limits, host="127.0.0.1", wire="f32", orphaned=True):
        self._stage, self._limits, self._wire, self._orphaned = stage, limits, wire, orphaned
        self._door = Door((host, 0), self._serve)
        self.address = self._door.address       # (host, port), for the driver and the stage before this one
        self._inbox, self._lock = queue.SimpleQueue(), threading.Lock()
        self._outputs = queue.SimpleQueue()     # steps that have come to the head, each of them with OUTPUTS in the inbox
        self._epoch, self._connected, self._unreachable = 0, threading.Event(), None
        self._onward = self._control = None     # Outbox of the next stage, or of the first; Outbox of the driver
        self._logs = Logs(stage)
        self._samplers, self._credits = {}, {}  # number -> (Sampler, ids that end an answer); step -> Follow
        self._doing, self._ended = None, threading.Event()      # (number of a step or request, when it began)
        self._left = None       # when there was no driver any more; None: there is one, or there was none yet
        for run in (self._work, self._beat):
            threading.Thread(target=run, name=f"pydsa stage {run.__name__}", daemon=True).start()

    def join(self, next_address, first_address, key, epoch):
        """Take a place in the pipeline, in place of an earlier one.

        next_address: (host, port) of the next stage; None at the last one, which has first_address, that of the first stage. key: that of
        all connections. epoch: a number that grows; frames with another one are ignored. The connection is made meanwhile.
        """
        with self._lock:
            self._leave()
            self._epoch, self._connected = epoch, threading.Event()
            self._samplers, self._credits, self._left = {}, {}, time.monotonic()
        self._door.open(key)
        address = first_address if next_address is None else next_address
        threading.Thread(target=self._connect, args=(address, key, epoch, self._connected), name="pydsa connects", daemon=True).start()

    def wait(self, timeout=None):
        """Wait until it has ended, closed or without a driver -> whether it has."""
        return self._ended.wait(timeout)

    def close(self):
        """End it: all connections, and the thread that runs steps."""
        self._ended.set()
        self._door.close()
        with self._lock:
            self._leave()
        self._inbox.put(None)

    def _leave(self):
        for box in (self._onward, self._control):
            if box is not None:
                box.close()
        self._onward = self._control = None

    # Connections

    def _connect(self, address, key, epoch, connected):
        what = f"the {'first' if self._stage.last else 'next'} stage"
        try:
            channel = connect(address, key, CONNECTING)
            channel.send(*encode(Message("hello", epoch, 0, {"for": STEPS})))
        except ChannelError as error:
            self._unreachable = f"it cannot reach {what}: {error}"
        else:
            with self._lock:
                self._unreachable = None
                if epoch == self._epoch:
                    self._onward = Outbox(channel, lambda error: self._tell_trouble(epoch, f"it cannot send to {what}: {error}"))
                else:
                    channel.close()
        connected.set()

    def _serve(self, channel):
        """Receive all that comes over a connection, until it ends."""
        purpose, epoch = None, 0
        try:
            hello = self._receive(channel)
            if not isinstance(hello, Message) or hello.kind != "hello" or hello.content.get("for") not in (CONTROL, STEPS):
                raise FrameError("a connection begins without a word on what it is for")
            purpose, epoch = hello.content["for"], hello.epoch
            if purpose == CONTROL:
                self._take_driver(channel, epoch)
            while (frame := self._receive(channel)) is not None:
                self._take(frame, purpose)
        except (FrameError, ChannelError) as error:
            if purpose is not None:
                source = "the driver" if purpose == CONTROL else "the stage before"
                self._tell_trouble(epoch, f"it received what it cannot read from {source}: {error}", seen=True)
        finally:
            channel.close()
            if purpose == CONTROL:
                self._lose_driver(epoch)

    def _receive(self, channel):
        data = channel.receive(self._limits.most)
        return None if data is None else decode(data, self._limits)

    def _take_driver(self, channel, epoch):
        with self._lock:
            if epoch != self._epoch:
                raise FrameError(f"a driver is of epoch {epoch}, expected {self._epoch}")
            self._control, self._left = Outbox(channel, lambda error: self._lose_driver(epoch)), None

    def _lose_driver(self, epoch):
        with self._lock:
            if epoch == self._epoch:
                self._left = self._left or time.monotonic()
                self._leave()

    def _take(self, frame, purpose):
        """Take a frame: at once what cannot wait, and the rest in turn."""
        if frame.epoch != self._epoch:
            return
        if isinstance(frame, Credit):
            with self._lock:
                self._credits[frame.number] = frame.follow
                if len(self._credits) > MOST_CREDITS:
                    del self._credits[next(iter(self._credits))]
        elif isinstance(frame, (Step, Close, Drop)) or isinstance(frame, Message) and frame.kind in ("sampler", "ask"):
            if isinstance(frame, Message) and frame.content.get("do") == "ready":
                threading.Thread(target=self._answer, args=(frame, self._ready), daemon=True).start()
            elif isinstance(frame, Step) and frame.rows is not None and self._stage.first:
                self._outputs.put(frame)
                self._inbox.put(OUTPUTS)
            else:
                self._inbox.put(frame)
        else:
            raise FrameError(f"a stage gets a {getattr(frame, 'kind', type(frame).__name__)!r}, which is not for stages")

    def _tell(self, frame):
        """Send a frame to the driver, if there is one."""
        control = self._control
        if control is not None and frame.epoch == self._epoch:
            control.send(*encode(frame))

    def _tell_trouble(self, epoch, text, seen=False):
        """Tell the driver of what is wrong with the pipeline, and no step's fault.

        seen: whether this stage has seen what is wrong, and not only what comes of it.
        """
        if not self._ended.is_set():
            self._tell(Message("failed", epoch, 0, {"kind": StageError.__name__, "text": text, "seen": seen}))

    def _beat(self):
        while not self._ended.wait(BEAT):
            doing, left = self._doing, self._left
            if self._orphaned and left is not None and time.monotonic() - left > ORPHANED:
                self.close()
            number, since = doing or (0, time.monotonic())
            cpu = time.process_time() - time.thread_time()      # without this thread's own
            with contextlib.suppress(ChannelError):
                self._tell(Beat(self._epoch, number, doing is not None, time.monotonic() - since, cpu, _page_faults()))

    # On the thread that runs steps

    def _work(self):
        while (frame := self._inbox.get()) is not None:
            if not self._outputs.empty():       # before one other thing: tokens do not wait for chunks that wait, nor these for many tokens
                self._do(self._outputs.get())
            if frame is not OUTPUTS:
                self._do(frame)

    def _do(self, frame):
        """Run a frame, and the steps that follow it here."""
        while frame is not None and frame.epoch == self._epoch:
            self._doing, following = (frame.number, time.monotonic()), None
            try:
                following = self._run(frame)
            except Exception as error:      # what is no step concerns all: number 0
                self._tell(Message("failed", frame.epoch, frame.number if isinstance(frame, Step) else 0, _told(error)))
            frame = following
        self._doing = None

    def _run(self, frame):
        """Do what a frame asks for -> the Step that comes next here, or None."""
        if isinstance(frame, Step):
            return self._step(frame)
        if isinstance(frame, Close):
            self._close(frame.number)
            self._forward(frame)
        elif isinstance(frame, Drop):
            self._samplers.pop(frame.number, None)
            self._forward(frame, self._stage.has_head)
        elif frame.kind == "sampler":
            if self._stage.has_head:
                self._samplers[frame.number] = Sampler.restored(frame.content.get("state")), frozenset(frame.content.get("ends", ()))
            self._forward(frame, self._stage.has_head)
        else:
            self._answer(frame, self._request)
        return None

    def _open(self, number):
        if number not in self._stage.sessions:      # it may have been opened before an answer was lost
            self._stage.open(number)

    def _close(self, number):
        self._stage.close(number)
        self._logs.close(number)

    def _forward(self, frame, arrived=False):
        """Send a frame on to the next stage, if it has not arrived at its own."""
        if not (arrived or self._stage.last):
            self._send_on(frame)

    def _send_on(self, frame):
        onward = self._onward
        if onward is not None:
            onward.send(*encode(frame, self._wire))
        else:
            self._tell_trouble(frame.epoch, f"it has no connection to the {'first' if self._stage.last else 'next'} stage")

    def _step(self, step):
        stage = self._stage
        of_head = stage.first and stage.has_head and not stage.last and step.rows is not None       # they come from the last stage
        if (step.rows is None) != stage.first and not of_head:
            raise FrameError(f"a step has {'no ' * (step.rows is None)}hidden rows, expected {'none' if stage.first else 'some'}")
        parts = [(part.session, part.n_tokens) for part in step.parts]
        inputs = step.ids if step.rows is None else np.asarray(step.rows, stage.float)
        if of_head:
            return self._finish(step, stage.head(parts, inputs, step.positions))
        out = stage.run(parts, step.variant, inputs, step.positions, len(step.samplers))
        if not stage.last:
            self._send_on(step._replace(rows=out))
        elif stage.has_head or not step.samplers:
            return self._finish(step, out)
        else:
            self._send_on(of_outputs(step, out))
        return None

    def _finish(self, step, logits):
        """Sample, and tell the driver -> the next step, if it may be.

        None where it is not for this stage, or its turn is behind others.
        """
        n_vocab = self._limits.n_vocab
        logits = np.empty((0, n_vocab), np.float32) if not step.samplers else np.asarray(logits, np.float32)
        samplers = [self._samplers.get(number, (None, ())) for number in step.samplers]
        picked = [_picked(sampler, row) for (sampler, _), row in zip(samplers, logits)]
        wanted = [i for i, number in enumerate(step.samplers) if number != DISCARD and picked[i] is None]
        with self._lock:
            follow = self._credits.pop(step.number, None) or step.follow
        following = None
        if follow is not None and len(picked) == len(step.parts) and all(
                one is not None and one.token not in ends for one, (_, ends) in zip(picked, samplers)):
            following = Step(step.epoch, follow.number, follow.variant, after(step.parts), step.samplers,
                             np.array([one.token for one in picked], np.int32))
            if self._stage.last:
                self._send_on(following)
        self._tell(Result(step.epoch, step.number, following is not None, picked, logits[wanted]))
        return None if self._stage.last else following

    def _answer(self, frame, answer):
        """Answer a request: answer(content, payload) -> (dict, bytes)."""
        try:
            content, payload = answer(frame.content, frame.payload)
        except Exception as error:
            content, payload = {"error": _told(error)}, b""
        self._tell(Message("answer", frame.epoch, frame.number, content, payload))

    def _ready(self, content, payload):
        """Whether the next stage has answered."""
        self._connected.wait(CONNECTING + HANDSHAKES)
        unreachable = self._unreachable if self._connected.is_set() else "it has not reached the next stage in time"
        return {"trouble": unreachable} if unreachable else {}, b""

    def _keep(self, sessions):
        """Close all sessions but these, and open those that are not there."""
        for number in set(self._stage.sessions) - sessions:
            self._close(number)
        for number in sorted(sessions):
            self._open(number)

    def _request(self, content, payload):
        """Do what the driver asks for between steps."""
        stage, do = self._stage, content.get("do")
        if do == "open":
            self._open(_number(content, "session"))
        elif do == "keep":
            self._keep({_checked(number, "session") for number in content.get("sessions", ())})
        elif do == "room":
            stage.check_room(_number(content, "n"), str(content.get("what")))
        elif do in ("stored", "restore"):
            return {}, self._rows(content, payload)
        elif do == "log":
            self._logs.append(_number(content, "session"), content)
        elif do == "logged":
            return {"n": self._logs.restore(_number(content, "session"), content)}, b""
        elif do == "unlog":
            self._logs.close_all()
        elif do == "part":
            return keeping.answered(stage, _number(content, "session"), content)
        else:
            raise FrameError(f"a stage is asked to {do!r:.40}, which it cannot do")
        return {}, b""

    def _rows(self, content, payload):
        """Give or take rows of a cache -> bytes-like."""
        number, ref = _number(content, "session"), CacheRef(str(content.get("kind")), _number(content, "layer"))
        stop = _number(content, "stop", self._limits.n_ctx)
        start = _number(content, "start", stop)
        cache = self._stage.caches(number).get(ref)
        if cache is None:
            raise FrameError(f"{ref} is no cache of this stage")
        if content["do"] == "stored":
            if (stop - start) * cache.row_bytes > MOST_PAYLOAD:
                raise FrameError(f"{stop - start} rows of a cache are asked for at once, at most "
                                 f"{MOST_PAYLOAD // cache.row_bytes} are expected")
            return np.array(self._stage.stored(number, ref, start, stop))
        if len(payload) != (stop - start) * cache.row_bytes:
            raise FrameError(f"{len(payload)} bytes come for {stop - start} rows of a cache, expected {cache.row_bytes} for each")
        self._stage.restore(number, ref, start, np.frombuffer(payload, np.uint8).reshape(-1, cache.row_bytes))
        return b""


def _picked(sampler, row):
    """The Picked of a row of logits, or None where the host must pick.

    It does that also where the pick fails: it has the session to tell of.
    """
    if sampler is None:
        return None
    try:
        return Picked(sampler.pick(row), float(row.max()), float(row.min()))
    except PydsaError:
        return None


def _number(content, key, most=2**31 - 1):
    return _checked(content.get(key), key, most)


def _checked(number, what, most=2**31 - 1):
    if not isinstance(number, int) or not 0 <= number <= most:
        raise FrameError(f"{what} is {number!r:.40}, expected 0 to {most}")
    return number


def _told(error):
    """An exception as the driver can raise it: its class and text."""
    if isinstance(error, StageError):       # of a class that only these modules know
        return {"kind": StageError.__name__, "text": str(error)}
    if isinstance(error, PydsaError):
        return {"kind": type(error).__name__, "text": str(error)}
    if isinstance(error, MemoryError):
        return {"kind": OutOfMemoryError.__name__, "text": "a stage has no more memory"}
    traceback.print_exception(error)
    return {"kind": "internal", "text": f"{type(error).__name__}: {error}"}


def _page_faults():
    """The page faults of this process; 0 where they are not known.

    One that has read a drive counts as 64. One that has waited for what was read ahead is no such, but comes with many others; this thread
    has a few of its own.
    """
    with contextlib.suppress(ImportError):
        import resource
        used = resource.getrusage(resource.RUSAGE_SELF)
        return 64 * used.ru_majflt + used.ru_minflt
    return 0
