"""Watch: what happens when a stage dies, falls silent or hangs.

Without `resume` all that is under way fails with an error that names the stage, and the others are ended. With it the stage is started
again, gets the caches that it had, and the steps under way are sent again: who waits for them sees nothing of it.
"""
import collections
import queue
import threading
import time
import traceback
import warnings

from pydsa.errors import PydsaError, StageError
from pydsa.stages.journal import Ran
from pydsa.stages.links import CAUSE, Lost, Trouble

LOOKS = 0.25        # seconds between two looks at the heartbeats
WITNESSES = 0.5     # seconds in which other reports may tell more exactly which stage has failed
TRIES = 3           # restarts after each other without a step between them
AT_ONCE = 2         # times the depth of the pipeline: the steps under way of all sessions together


def start_all(launcher, which=None):
    """Start stages, all at once; which: their indices, None: all.

    Raises the error of the first that cannot be started, when all have ended their start.
    """
    found = {}

    def start(i):
        try:
            launcher.start(i)
        except BaseException as error:
            found[i] = error
    threads = [threading.Thread(target=start, args=(i,), name=f"pydsa starts stage {i}", daemon=True)
               for i in (range(len(launcher.stages)) if which is None else which)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)        # so that Ctrl-C ends it on any system
    if found:
        raise found[min(found)]


class Watch:
    """Looks at the stages of a pipeline, and does what is to be done."""

    def __init__(self, pipeline):
        self._pipeline, self._reports, self._stopped = pipeline, queue.SimpleQueue(), threading.Event()
        self._restarts, self._finished, self._n = 0, 0, 0       # restarts since a step was finished, how many were then; all restarts

    def start(self):
        """Begin to look."""
        threading.Thread(target=self._run, name="pydsa watches stages", daemon=True).start()

    def stop(self):
        """Look no more."""
        self._stopped.set()

    def report(self, i, text, rank):
        """Say that something is wrong with stage i.

        rank: how far that is from the cause, one of links.CAUSE to EFFECT. Of several reports the one of the least rank counts.
        """
        self._reports.put((rank, i, text))

    def wait(self, event):
        """Wait for an answer of a stage while the pipeline is set up.

        Raises Trouble if a stage fails meanwhile.
        """
        while not event.wait(LOOKS):
            self._raise_trouble()

    def _raise_trouble(self):
        if self._pipeline.error is not None:
            raise StageError(str(self._pipeline.error))
        trouble = self._next(0.001) or self._pipeline.links.unwell()
        if trouble:
            raise Trouble(*self._best(trouble))

    def _next(self, seconds):
        """The next report within some seconds: (rank, stage, text); None."""
        try:
            return self._reports.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return None

    def _best(self, report=None):
        """The report that is next to the cause, of one and those that come soon: (stage, text)."""
        reports, until = [report] if report else [], time.monotonic() + WITNESSES
        while not (reports and reports[-1][0] == CAUSE) and (report := self._next(until - time.monotonic())):
            reports.append(report)
        return min(reports, key=lambda report: report[0])[1:] if reports else (0, "it does not answer")

    def trouble(self, error):
        """The StageError of a Trouble, or of a Lost, which leaves a report."""
        return self.failure(*(error.args if isinstance(error, Trouble) else self._best()))

    def failure(self, i, text):
        """The StageError of a stage that has failed."""
        return StageError(f"{self._pipeline.links.name(i)} has failed: {text}.")

    def _run(self):
        pipeline = self._pipeline
        try:
            while not self._stopped.is_set():
                trouble = self._next(LOOKS) or pipeline.links.unwell()
                if trouble is None:
                    pipeline.tidy()
                elif not self._stopped.is_set():
                    self._deal(*self._best(trouble))
        except Exception as error:      # without a watch, calls could wait for ever
            traceback.print_exception(error)
            pipeline.end(StageError(f"The watch over the stages met an internal error ({error!r}); they were ended."))

    def _deal(self, i, text):
        """End the pipeline, or start a stage again."""
        pipeline = self._pipeline
        pipeline.links.close()          # wakes who sends
        if pipeline.journal is None:
            pipeline.end(StageError(f"{self.failure(i, text)} The other stages were ended. With --resume it is started again by itself."))
            return
        with pipeline.sending:
            while pipeline.error is None:
                try:
                    self._restart(i, text)
                    return
                except Trouble as trouble:
                    i, text = trouble.args
                except Lost:
                    i, text = self._best()
                except PydsaError as error:
                    pipeline.end(StageError(f"{self.failure(i, text)} It could not be started again: {error} The other stages "
                                            "were ended."))
                except Exception as error:
                    traceback.print_exception(error)
                    pipeline.end(StageError(f"{self.failure(i, text)} Starting it again met an internal error ({error!r}). The other "
                                            "stages were ended."))

    def _restart(self, i, text):
        """Start a stage again, and let all go on."""
        pipeline, launcher = self._pipeline, self._pipeline.launcher
        self._restarts = self._restarts + 1 if pipeline.n_finished == self._finished else 1
        self._finished = pipeline.n_finished
        if self._restarts > TRIES:
            raise StageError(f"it was started {TRIES} times, and failed again before a step was done.")
        pipeline.links.close()
        self._n += 1
        warnings.warn(f"{self.failure(i, text)} It is started again (restart {self._n} of this model), which takes as long as loading it; "
                      "then all goes on.", stacklevel=2)
        gone = [i, *(j for j in range(len(launcher.stages)) if j != i and not launcher.alive(j))]
        for j in gone:
            launcher.kill(j)
        start_all(launcher, gone)
        while self._next(0.001):        # of what has ended
            pass
        pipeline.drop_unwanted()
        pipeline.close_left()
        pipeline.links.connect(self.wait)
        pipeline.links.ask_all({"do": "keep", "sessions": sorted(pipeline.conversations)}, self.wait)
        pipeline.samplers.forget()
        self._replay()
        for pending in pipeline.drop_unwanted():
            pipeline.send(pending)

    def _replay(self):
        """Make the caches of all sessions as they were."""
        pipeline, begun = self._pipeline, collections.deque()

        def ask(i, content, payload):
            return pipeline.links.answered(pipeline.links.ask(i, content, payload), self.wait)

        def finish(n):
            """Wait until at most n steps are under way."""
            while len(begun) > n:
                pending = begun.popleft()
                self.wait(pending.done)
                if pending.error is not None:
                    raise pending.error
        saved = pipeline.saves.restore(ask)
        try:
            for made in pipeline.journal.replay(set(pipeline.conversations), saved):
                if isinstance(made, Ran):
                    finish(AT_ONCE * pipeline.depth)
                    begun.append(pipeline.replay(made))
                else:
                    finish(0)
                    pipeline.write(*made, ask)
            finish(0)
        finally:
            with pipeline.changed:
                for pending in begun:
                    pipeline.remove(pending)
