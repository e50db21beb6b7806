"""Stages that die, hang, fall silent or talk nonsense: an error that names them, soon, or all goes on as if nothing had been."""
import signal
import struct
import threading
import time

import numpy as np
import pytest
from helpers import random_ids
from stage_processes import OPTIONS, Launcher, Processes, session

import pydsa
from pydsa.engine.batch import Batch
from pydsa.errors import StageError
from pydsa.sampling import Sampling
from pydsa.stages import faults, links
from pydsa.stages import worker as workers
from pydsa.stages.pipeline import Pipeline
from pydsa.stages.stage import Stage

pytestmark = pytest.mark.filterwarnings("ignore:.*It is started again")
STAGES, TWO = [(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 3)]
PROMPT = random_ids(30)
DRAWN = Sampling(temperature=1.0, seed=4)
SECOND = r"^Stage 2 of [23] \(layers 1-[12], node 127.0.0.1\) has failed: "


@pytest.fixture(scope="module")
def path(small_model):
    return small_model(n_layer=3)


@pytest.fixture(scope="module")
def whole(path):
    return pydsa.load(path, **OPTIONS)


@pytest.fixture
def piped(path, monkeypatch):
    """piped(launcher class, ...) -> a Pipeline, which ends with the test."""
    made = []
    monkeypatch.setattr(workers, "BEAT", 0.1)
    monkeypatch.setattr(faults, "WITNESSES", 0.2)

    def make(launcher=Launcher, resume=None, stages=STAGES, **options):
        launcher = launcher(path, stages, **options)
        made.append(Pipeline(launcher, launcher.setup, resume=resume))
        return made[-1]
    yield make
    for pipeline in made:
        pipeline.close()


def answered(one, n, after=0, act=lambda: None):
    """The tokens of an answer; act() is called after some of them."""
    met = []
    for token in one.generate(PROMPT, n, DRAWN):
        met.append(token)
        if len(met) == after:
            act()
    return met


def wait_for_end(pipeline, seconds=5):
    """Wait until the other stages are ended, which comes after the error."""
    end = time.monotonic() + seconds
    while not pipeline.launcher.closed:
        assert time.monotonic() < end, "the other stages are not ended"
        time.sleep(0.01)


def expected(whole, n):
    """These tokens, and the logits after two more."""
    one = whole.session()
    return answered(one, n), one.prefill([1, 2])


def test_a_stage_that_is_killed(piped):
    """kill -9 while an answer runs: an error within a second, and no process is left."""
    pipeline = piped(Processes, stages=TWO)
    mine = session(pipeline)
    start = []

    def kill():
        start.append(time.monotonic())
        pipeline.launcher.signal(1, signal.SIGKILL)
    with pytest.raises(StageError, match=SECOND + "its connection has ended: its process has died.*The other stages were ended"):
        answered(mine, 30, 3, kill)
    assert time.monotonic() - start[0] < 3
    with pytest.raises(StageError, match=SECOND):
        mine.decode(1)
    wait_for_end(pipeline)
    assert not any(pipeline.launcher.alive(i) for i in range(2))


def test_a_stage_that_is_killed_and_resumed(piped, whole):
    """Identical tokens and logits: while an answer runs, and between steps."""
    tokens, logits = expected(whole, 12)
    pipeline = piped(Processes, resume=True, stages=TWO)
    mine = session(pipeline)
    with pytest.warns(UserWarning, match=SECOND + r"its connection .* It is started again \(restart 1 of this model\)"):
        assert answered(mine, 12, 5, lambda: pipeline.launcher.signal(1, signal.SIGKILL)) == tokens
    pipeline.launcher.signal(0, signal.SIGKILL)
    np.testing.assert_array_equal(mine.prefill([1, 2]), logits)
    assert pipeline.launcher.n_starts == [2, 2] and pipeline.error is None


def test_a_stage_that_stands_still(piped, monkeypatch):
    """SIGSTOP, as a machine without power: nothing comes, and nothing ends."""
    monkeypatch.setattr(links, "SILENT", 0.6)
    pipeline = piped(Processes, stages=TWO)
    mine = session(pipeline)
    mine.prefill(PROMPT)
    pipeline.launcher.signal(1, signal.SIGSTOP)
    with pytest.raises(StageError, match=SECOND + "no sign of life has come from it"):
        mine.prefill(PROMPT)


class Sick(Stage):
    """A stage that calls functions of `ill` before steps, each once.

    It does if it is neither the first nor the last.
    """
    ill = []

    def run(self, *args):
        """Run a step."""
        if self.ill and not self.first and not self.last:
            self.ill.pop()()
        return super().run(*args)


@pytest.fixture
def sick(monkeypatch):
    """Functions that the middle stage calls before its next steps, a list."""
    monkeypatch.setattr("stage_processes.Stage", Sick)
    monkeypatch.setattr(Sick, "ill", [])
    return Sick.ill


@pytest.mark.parametrize("resume", [None, True])
def test_a_stage_that_hangs(piped, whole, sick, monkeypatch, resume):
    monkeypatch.setattr(links, "STUCK", 0.4)
    pipeline, gate = piped(resume=resume), threading.Event()
    mine = session(pipeline)
    sick.append(lambda: gate.wait(20))
    if resume:
        assert answered(mine, 5) == expected(whole, 5)[0]
    else:
        with pytest.raises(StageError, match=SECOND + "it hangs in a step: for 0 seconds it has neither computed nor read"):
            mine.prefill(PROMPT)
    gate.set()


def test_a_stage_that_works_long_does_not_hang(piped, sick, monkeypatch):
    """Neither where it computes, nor where it waits for a drive."""
    monkeypatch.setattr(links, "STUCK", 0.4)
    pipeline = piped()
    mine = session(pipeline)

    def compute():
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            np.linalg.norm(np.ones(1000))

    def read():
        for n in range(16):
            monkeypatch.setattr(workers, "_page_faults", lambda: 64 * n)
            time.sleep(0.05)
    for sick[:] in ([compute], [read]):
        mine.prefill(PROMPT[:8])


def test_a_driver_that_stood_still_blames_nobody(piped, monkeypatch):
    """Ctrl-Z and fg: no heartbeat was heard, as nobody listened."""
    monkeypatch.setattr(links, "SILENT", 0.3)
    monkeypatch.setattr(links, "LATE", 0.3)
    pipeline = piped()
    real = pipeline.links.unwell
    monkeypatch.setattr(pipeline.links, "unwell", lambda: None)     # the watch does not come to look
    pipeline.links._heard = {i: [when - 60, beat, advanced - 60] for i, (when, beat, advanced) in pipeline.links._heard.items()}
    for box in pipeline.links._controls:
        box.channel.heard -= 60
    pipeline.links._looked -= 60
    assert real() is None
    monkeypatch.setattr(pipeline.links, "unwell", real)
    assert session(pipeline).prefill(PROMPT).shape == (300,)


NONSENSE = {"a frame of no kind": struct.pack("<Q", 16) + b"\xff" * 16, "a hostile length": struct.pack("<Q", 2**63) + b"x",
            "a cut frame": struct.pack("<Q", 1000) + b"x" * 10}


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize("name", NONSENSE)
@pytest.mark.parametrize("to", ["next", "driver"])
def test_nonsense_on_the_wire(piped, whole, sick, name, to, resume):
    """Stage 2 sends it to stage 3, or to the driver. Nobody crashes or waits for ever."""
    pipeline = piped(resume=resume)
    mine = session(pipeline)

    def talk():
        worker = pipeline.launcher.workers[1]
        box = worker._onward if to == "next" else worker._control
        box.channel._socket.sendall(NONSENSE[name])
        if name == "a cut frame":
            box.channel.close()
    sick.append(talk)
    if resume:
        assert answered(mine, 5) == expected(whole, 5)[0]
    else:
        with pytest.raises(StageError, match=r"^Stage [23] of 3 \(layers .*\) has failed: "):
            answered(mine, 5)


def test_nonsense_from_the_driver_is_told(piped):
    pipeline = piped()
    pipeline.links._steps.channel._socket.sendall(NONSENSE["a frame of no kind"])
    with pytest.raises(StageError, match="^Stage 1 of 3 .*received what it cannot read from the stage before: a frame"):
        for _ in range(100):
            session(pipeline).prefill(PROMPT)
            time.sleep(0.02)


def test_what_was_restored_is_resumed(piped, whole, tmp_path):
    """Rows from elsewhere, a save, conversations that were cut, or are over."""
    pipeline = piped(resume=tmp_path)
    mine, theirs = session(pipeline), whole.session()
    donor = whole.session()
    donor.prefill(PROMPT[:12])
    over = session(pipeline)
    over.prefill(PROMPT[:5])
    for one in (mine, theirs):
        one.prefill(PROMPT[:6])
        one.truncate(4)
        one.paste(PROMPT[4:12], donor.cut(4, 12))
        one.prefill([3, 4])
    del over
    saved = dict(zip(mine.caches, mine.cut(0, mine.n_past)))
    pipeline.launcher.kill(1)
    np.testing.assert_array_equal(mine.decode(5), theirs.decode(5))
    mine.caches.saved(14, lambda ref, start, stop, ask: saved[ref][start:stop])
    mine.truncate(14)
    theirs.truncate(14)
    pipeline.launcher.kill(2)
    np.testing.assert_array_equal(mine.decode(6), theirs.decode(6))
    for mine_rows, their_rows in zip(mine.cut(0, 15), theirs.cut(0, 15)):
        np.testing.assert_array_equal(mine_rows, their_rows)
    assert pipeline.launcher.n_starts == [1, 2, 2]


def test_many_sessions_are_resumed(piped, whole):
    """Batches of several sessions, and threads that wait for answers."""
    pipeline, met = piped(resume=True), {}
    prompts = [PROMPT[i:i + 2 + 2 * i] for i in range(4)]
    batch, several = Batch(pipeline, pipeline.setup), [session(pipeline) for _ in range(2)]
    batch.run(several, prompts[:2])

    def answer(i):
        met[i] = list(session(pipeline).generate(prompts[i], 8, DRAWN))
    threads = [threading.Thread(target=answer, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    pipeline.launcher.kill(1)
    for thread in threads:
        thread.join()
    assert met == {i: list(whole.session().generate(prompt, 8, DRAWN)) for i, prompt in enumerate(prompts)}
    theirs = [whole.session() for _ in range(2)]
    other = Batch(whole.runner, whole.setup)
    other.run(theirs, prompts[:2])
    for mine_logits, their_logits in zip(batch.run(several, [[1], [2]]), other.run(theirs, [[1], [2]])):
        np.testing.assert_array_equal(mine_logits, their_logits)


def test_a_stage_that_cannot_be_started_again(piped):
    pipeline = piped(resume=True, broken=(1,))
    mine = session(pipeline)
    pipeline.launcher.kill(1)
    with pytest.raises(StageError, match=SECOND + ".*could not be started again: stage 2 of 3 .*: the file is not there any more.* ended"):
        mine.prefill(PROMPT)
    wait_for_end(pipeline)


def test_a_stage_that_fails_again_and_again(piped, monkeypatch):
    pipeline = piped(resume=True)
    mine = session(pipeline)
    mine.prefill(PROMPT[:3])
    run = Stage.run

    def die(self, *args):
        if self.last:
            pipeline.launcher.kill(2)
        return run(self, *args)
    monkeypatch.setattr(Stage, "run", die)
    with pytest.raises(StageError, match="^Stage 3 of 3 .*it was started 3 times, and failed again before a step was done"):
        mine.decode(3)


def test_a_start_that_fails(path, monkeypatch):
    """The stage's own error, and the others are ended."""
    launcher = Launcher(path, STAGES)
    monkeypatch.setattr(launcher, "made", lambda i: Launcher.made(launcher, i) if i != 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Pipeline(launcher, launcher.setup)
    assert launcher.closed
    launcher = Launcher(path, STAGES)
    monkeypatch.setattr(launcher, "address", lambda i: ("127.0.0.1", 1) if i == 2 else launcher.workers[i].address)
    with pytest.raises(StageError, match="^Stage 3 of 3 .* has failed: it cannot be reached: nothing answers at 127.0.0.1:1"):
        Pipeline(launcher, launcher.setup)
    assert launcher.closed


def test_a_stage_that_cannot_reach_the_next(path, monkeypatch):
    launcher, join = Launcher(path, STAGES), Launcher.join
    monkeypatch.setattr(launcher, "join", lambda i, after, *others: join(launcher, i, ("127.0.0.1", 1) if i == 1 else after, *others))
    with pytest.raises(StageError, match="^Stage 2 of 3 .*: it cannot reach the next stage: nothing answers at 127.0.0.1:1"):
        Pipeline(launcher, launcher.setup)


def test_a_worker_without_a_driver_ends(path, monkeypatch):
    monkeypatch.setattr(workers, "BEAT", 0.02)
    monkeypatch.setattr(workers, "ORPHANED", 0.2)
    launcher = Launcher(path, STAGES)
    launcher.start(0)
    time.sleep(0.3)
    assert launcher.alive(0)        # it has had none: others are still loaded
    launcher.kill(0)
    pipeline = Pipeline(launcher, launcher.setup)
    time.sleep(0.3)
    assert all(launcher.alive(i) for i in range(3))
    pipeline.links.close()
    assert all(worker.wait(5) for worker in launcher.workers.values())
    pipeline.close()
