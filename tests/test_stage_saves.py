"""Rows that stages save while conversations go on: what a stage that is started again need not compute, and what is left."""
import gc
import os
import random
import signal
import time
import warnings

import pytest
from helpers import random_ids
from stage_processes import OPTIONS, Launcher, Processes, session

import pydsa
from pydsa import PydsaError, SessionFileError
from pydsa.engine.batch import Batch
from pydsa.saved.log import SessionLog
from pydsa.stages import saves
from pydsa.stages import worker as workers
from pydsa.stages.pipeline import Pipeline
from pydsa.stages.saves import Logs

pytestmark = pytest.mark.filterwarnings("ignore:.*It is started again")
STAGES = [(0, 1), (1, 3)]
PROMPT = random_ids(30)


class Killing(Launcher):
    """Stages in threads, whose files stay when they are ended as by kill -9."""

    def die(self, i):
        """End a worker, and leave its logs."""
        self.workers[i]._logs = Logs(None)
        self.kill(i)


@pytest.fixture(scope="module")
def path(small_model):
    return small_model(n_layer=3)


@pytest.fixture(scope="module")
def whole(path):
    return pydsa.load(path, **OPTIONS)


@pytest.fixture
def piped(path, monkeypatch, tmp_path):
    """piped(launcher class) -> a Pipeline that saves when it is told to."""
    made = []
    monkeypatch.setattr(workers, "BEAT", 0.1)
    monkeypatch.setattr(saves, "EVERY", 3600)

    def make(launcher=Killing):
        launcher = launcher(path, STAGES)
        made.append(Pipeline(launcher, launcher.setup, resume=tmp_path / "saves"))
        return made[-1]
    yield make
    for pipeline in made:
        pipeline.close()


def logits(one, ids):
    return one.prefill(ids).tobytes()


def steps_of(pipeline, act):
    """How many steps began while a function ran."""
    before = pipeline.steps
    act()
    return pipeline.steps - before


def test_what_is_saved_is_not_run_again(piped, whole, tmp_path):
    """A process that is killed: only tokens after the save are."""
    pipeline, mine = piped(Processes), whole.session()
    other = session(pipeline)
    assert logits(other, PROMPT) == logits(mine, PROMPT)
    assert pipeline.saves.save() and len(os.listdir(tmp_path / "saves")) == 2
    assert logits(other, [1]) == logits(mine, [1])
    pipeline.launcher.signal(1, signal.SIGKILL)
    assert steps_of(pipeline, lambda: other.decode(2)) == 2        # the token after the save, and this one
    mine.decode(2)
    assert logits(other, [3]) == logits(mine, [3]) and pipeline.launcher.n_starts == [1, 2]


def test_files_of_sessions_that_have_ended_are_removed(piped, tmp_path):
    pipeline = piped()
    first, second = session(pipeline), session(pipeline)
    for one in (first, second):
        one.prefill(PROMPT[:5])
    pipeline.saves.save()
    assert len(os.listdir(tmp_path / "saves")) == 4
    del one, first
    gc.collect()
    pipeline.tidy()
    second.decode(1)
    pipeline.saves.save()
    assert len(os.listdir(tmp_path / "saves")) == 2
    pipeline.close()
    assert os.listdir(tmp_path / "saves") == []


def test_saves_come_by_themselves(piped, monkeypatch, tmp_path):
    monkeypatch.setattr(saves, "EVERY", 0.05)
    pipeline = piped()
    mine = session(pipeline)
    mine.prefill(PROMPT)
    end = time.monotonic() + 5
    while pipeline.journal.needed({mine.caches.number}) != {mine.caches.number: 30}:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("seed", range(2))
def test_whatever_conversations_do(piped, whole, seed):
    """All that there is, by chance, with saves and ends of stages between.

    Prompts, tokens, forgotten tokens, rows of other sessions, steps together.
    """
    chance, pipeline = random.Random(seed), piped()
    pairs = [(session(pipeline), whole.session()) for _ in range(3)]
    batches = Batch(pipeline, pipeline.setup), Batch(whole.runner, whole.setup)
    for _ in range(40):
        act = chance.choice(["prompt", "token", "token", "together", "truncate", "paste", "save", "save", "die"])
        pair, ids = chance.choice(pairs), random_ids(chance.randint(2, 12), chance.randrange(1000))
        if act == "save":
            assert pipeline.saves.save()
        elif act == "die":
            pipeline.launcher.die(chance.randrange(2))
        elif act == "together":
            found = [batch.run([pair[i] for pair in pairs], [[token] for token in ids[:2] + [1]]) for i, batch in enumerate(batches)]
            assert [a.tobytes() for a in found[0]] == [b.tobytes() for b in found[1]]
        elif act == "truncate" or pair[0].n_past + len(ids) > 50:
            n = chance.randint(0, pair[0].n_past)
            for one in pair:
                one.truncate(n)
        elif act == "paste":
            for one, other in zip(pair, pairs[0]):
                one.paste(ids[:other.n_past], other.cut(0, min(len(ids), other.n_past)))
        else:
            assert logits(pair[0], ids[:1] if act == "token" else ids) == logits(pair[1], ids[:1] if act == "token" else ids)
    for staged, mine in pairs:
        assert logits(staged, [7]) == logits(mine, [7])


def lost(folder, log):
    log.unlink()


def damaged(folder, log):
    log.write_bytes(b"nothing")


@pytest.mark.parametrize("harm, message", [(lost, "Stage 2 of 2 .* has not the rows of all tokens"),
                                           (damaged, "is not a log of a session")])
def test_saves_that_are_lost_or_damaged(piped, whole, tmp_path, harm, message):
    """All is run again, with a warning; later saves are whole ones."""
    pipeline, mine = piped(), whole.session()
    other = session(pipeline)
    other.prefill(PROMPT)
    mine.prefill(PROMPT)
    pipeline.saves.save()
    log, = (tmp_path / "saves").glob("*layers-1-2.log")
    harm(tmp_path, log)
    with pytest.warns(UserWarning, match=message):
        pipeline.launcher.die(1)
        assert logits(other, [1]) == logits(mine, [1])
    if harm is lost:
        assert pipeline.saves.save()
        pipeline.launcher.die(1)
        assert steps_of(pipeline, lambda: other.decode(2)) == 1


def test_a_full_disk_is_told_and_does_no_harm(piped, whole, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    pipeline, mine = piped(), whole.session()
    other = session(pipeline)
    other.prefill(PROMPT)
    mine.prefill(PROMPT)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="conversations are not saved.*No space left on device"):
        patch.setattr(SessionLog, "_add", full)
        assert not pipeline.saves.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline.saves.save()
    pipeline.launcher.die(0)
    assert logits(other, [1]) == logits(mine, [1])


@pytest.mark.parametrize("place", ["file", "file/saves", "zero\0byte"])
def test_a_folder_that_cannot_be_written_to(path, tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    launcher = Launcher(path, STAGES)
    with pytest.raises(PydsaError, match="resume is '.*', a folder that cannot be written to"):
        Pipeline(launcher, launcher.setup, resume=str(tmp_path / place))
    assert launcher.n_starts == [0, 0]


def test_rows_that_a_full_disk_does_not_take(piped, monkeypatch):
    """Those of another session, which no step can make again."""
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    pipeline = piped()
    first, second = session(pipeline), session(pipeline)
    first.prefill(PROMPT)
    rows = first.cut(0, 30)
    with monkeypatch.context() as patch, pytest.raises(SessionFileError, match="cannot be written there .No space left on device"):
        patch.setattr("tempfile.TemporaryFile", full)
        second.paste(PROMPT, rows)
    assert second.n_past == 0
    second.paste(PROMPT, rows)
    pipeline.launcher.die(0)
    assert logits(second, [1]) == logits(first, [1])
