"""Links: the driver's connections to its stages, requests to them, and what their heartbeats say."""
import itertools
import os
import threading
import time

from pydsa import errors
from pydsa.errors import PydsaError, StageError
from pydsa.stages.channel import KEY_BYTES, ChannelError, Outbox, connect
from pydsa.stages.wire import Beat, FrameError, Message, decode, encode
from pydsa.stages.worker import CONTROL, STEPS

SILENT = 5.0        # seconds without a heartbeat after which a stage is lost
STUCK = 8.0         # seconds in a step in which a stage neither computes nor reads
COMPUTES = 0.005    # CPU seconds between two heartbeats, from which on it computes
LATE = 2.0          # seconds by which a look at the heartbeats may be late: beyond, this process itself stood still
CAUSE, SEEN, BROKEN, EFFECT = range(4)      # ranks of reports: how far they are from what has failed
GONE = "its connection has ended: its process has died, or its node is not reached any more"


class Trouble(Exception):
    """A stage has failed. Arguments: its index, and what was met."""


class Lost(Exception):
    """A request's stage is gone before it has answered."""


class _Waiter:
    """A request to a stage."""

    def __init__(self, stage):
        self.stage, self.done, self.answer, self.lost = stage, threading.Event(), None, False

    def result(self):
        """(dict, payload) of the answer; raises its error, or Lost."""
        if self.lost:
            raise Lost
        return self.answer


def raised(content, name):
    """The exception that a stage tells of, {"kind": ..., "text": ...}.

    name: that of the stage. Errors keep their class; faults of pydsa's code become a StageError.
    """
    kind, text = getattr(errors, str(content.get("kind")), None), str(content.get("text"))
    if isinstance(kind, type) and issubclass(kind, PydsaError):
        return kind(f"{name}: {text}")
    return StageError(f"{name} met an internal error ({text}); its own messages say where.")


class Links:
    """Connections to all stages of a launcher.

    take(i, frame) is called for what stage i sends, on a thread of that stage; fault(i, text, rank) when its connection ends, or brings
    what no stage may send. limits: wire.Limits. wire: one of wire.WIRES.
    """

    def __init__(self, launcher, limits, wire, take, fault):
        self._launcher, self._limits, self._wire, self._take, self._fault = launcher, limits, wire, take, fault
        self.epoch, self._controls, self._steps = 0, [], None
        self._key = os.urandom(KEY_BYTES)       # always the same: a stage that has joined anew connects to one that has not yet
        self._lock, self._waiting, self._numbers = threading.Lock(), {}, itertools.count(1)
        self._heard, self._looked = {}, time.monotonic()        # stage -> [when, Beat, when it last advanced]

    def connect(self, wait):
        """Join the stages anew, and connect to them; all have answered then.

        wait(event) waits for an answer, and may raise. Raises Trouble if a stage cannot be reached.
        """
        self.close()
        launcher, key, n = self._launcher, self._key, len(self._launcher.stages)
        self.epoch += 1
        addresses = [self._of(i, launcher.address) for i in range(n)]
        for i in range(n):
            self._of(i, launcher.join, *((addresses[i + 1], None) if i + 1 < n else (None, addresses[0])), key, self.epoch)
        self._heard = {}
        for i in range(n):
            self._heard[i] = [time.monotonic(), None, time.monotonic()]
            self._controls.append(self._opened(i, addresses[i], key, CONTROL))
        self._steps = self._opened(0, addresses[0], key, STEPS)
        for i, (answer, _) in enumerate(self.ask_all({"do": "ready"}, wait)):
            if "trouble" in answer:
                raise Trouble(i, answer["trouble"])

    def _of(self, i, function, *args):
        """What the launcher tells of stage i, or does with it."""
        try:
            return function(i, *args)
        except PydsaError as error:
            raise Trouble(i, f"it does not join the others: {error}") from error

    def _opened(self, i, address, key, purpose):
        epoch = self.epoch
        try:
            channel = connect(address, key)
            channel.send(*encode(Message("hello", epoch, 0, {"for": purpose})))
        except ChannelError as error:
            raise Trouble(i, f"it cannot be reached: {error}") from error
        if purpose == CONTROL:
            threading.Thread(target=self._receive, args=(i, channel, epoch), name=f"pydsa from stage {i}", daemon=True).start()
        return Outbox(channel, lambda error: self._ended(i, epoch, str(error), BROKEN), at_once=False)

    def name(self, i):
        """The name of a stage, as a sentence begins with it."""
        name = self._launcher.names[i]
        return name[:1].upper() + name[1:]

    def close(self):
        """End all connections; requests under way are lost."""
        boxes, self._controls, self._steps = [*self._controls, self._steps], [], None
        self.epoch += 1         # what these still bring is of the past
        for box in boxes:
            if box is not None:
                box.close()
        self._lose(None)

    def send(self, frame):
        """Send a frame to the first stage, and so in order through all.

        If the connection ends, fault() is called.
        """
        box = self._steps
        if box is not None:
            box.send(*encode(frame._replace(epoch=self.epoch), self._wire))

    def tell(self, i, frame):
        """Send a frame to one stage, past those that go through all."""
        boxes = self._controls
        if i < len(boxes):
            boxes[i].send(*encode(frame._replace(epoch=self.epoch)))

    def ask(self, i, content, payload=b""):
        """Begin a request to a stage -> a _Waiter."""
        waiter, number = _Waiter(i), next(self._numbers)
        with self._lock:
            self._waiting[number] = waiter
        if i < len(self._controls):
            self.tell(i, Message("ask", 0, number, content, payload))
        else:
            self._lose(i)
        return waiter

    def answered(self, waiter, wait):
        """Wait for the answer to a request -> (dict, payload).

        Raises the error that the stage tells of, and Lost if it is gone.
        """
        wait(waiter.done)
        content, payload = waiter.result()
        if "error" in content:
            raise raised(content["error"], self.name(waiter.stage))
        return content, payload

    def ask_all(self, content, wait):
        """A request to all stages at once -> their answers."""
        waiters = [self.ask(i, content) for i in range(len(self._launcher.stages))]
        return [self.answered(waiter, wait) for waiter in waiters]

    def _lose(self, i):
        """Requests to stage i, None: to all, get no answer any more."""
        with self._lock:
            lost = [number for number, waiter in self._waiting.items() if i is None or waiter.stage == i]
            waiters = [self._waiting.pop(number) for number in lost]
        for waiter in waiters:
            waiter.lost = True
            waiter.done.set()

    def _receive(self, i, channel, epoch):
        text = GONE
        try:
            while epoch == self.epoch and (data := channel.receive(self._limits.most_result)) is not None:
                frame = decode(data, self._limits)
                if epoch != self.epoch or frame.epoch != epoch:
                    continue
                if isinstance(frame, Beat):
                    self._hear(i, frame)
                elif isinstance(frame, Message) and frame.kind == "answer":
                    self._answer(i, frame)
                else:
                    self._take(i, frame)
        except ChannelError as error:
            text = str(error)
        except FrameError as error:
            text = f"it has sent what cannot be read: {error}"
        finally:
            channel.close()
            self._ended(i, epoch, text, CAUSE)

    def _ended(self, i, epoch, text, rank):
        if epoch == self.epoch:
            self._lose(i)
            self._fault(i, text, rank)

    def _answer(self, i, frame):
        with self._lock:
            waiter = self._waiting.get(frame.number)
            if waiter is None or waiter.stage != i:
                raise FrameError("an answer to what was not asked")
            del self._waiting[frame.number]
        waiter.answer = frame.content, frame.payload
        waiter.done.set()

    def _hear(self, i, beat):
        now = time.monotonic()
        _, before, advanced = self._heard[i]
        same = before is not None and beat.busy and before.busy and beat.number == before.number
        if not same or beat.cpu - before.cpu > COMPUTES or beat.faults != before.faults:
            advanced = now
        self._heard[i] = [now, beat, advanced]

    def unwell(self):
        """A report of a stage that is silent or stuck.

        It is (CAUSE, the stage's index, text); None: there is none.
        """
        now, self._looked, looked = time.monotonic(), time.monotonic(), self._looked
        if now - looked > LATE:         # this process was stopped: nobody could hear anything
            self._heard = {i: [now, beat, now] for i, (_, beat, _) in self._heard.items()}
            return None
        channels = [box.channel for box in self._controls]
        for i, (heard, beat, advanced) in list(self._heard.items()):
            if now - max(heard, channels[i].heard if i < len(channels) else 0.0) > SILENT:      # a long result holds heartbeats up
                return CAUSE, i, f"no sign of life has come from it for {SILENT:.0f} seconds"
            if beat is not None and beat.busy and now - advanced > STUCK:
                return CAUSE, i, f"it hangs in a step: for {STUCK:.0f} seconds it has neither computed nor read anything"
        return None
