"""Sessions saved in parts: other numbers of stages, parts that lie elsewhere, and what is refused."""
import json
import os

import pytest
from helpers import random_ids
from stage_processes import OPTIONS, Launcher

from pydsa import ContextFullError, SessionFileError
from pydsa.saved.parts import HEAD, PART, Keeper, opened, saved_bytes, write_parts
from pydsa.session import Session
from pydsa.stages.pipeline import Pipeline

IDS = random_ids(40)
GLM = dict(arch="glm-dsa", n_layer=4, indexer_types="FSFF")
ONE, TWO, OTHERS, FOUR = [(0, 4)], [(0, 2), (2, 4)], [(0, 3), (3, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]


class Remote:
    """A Keeper on another machine, whose folders are in one of their own.

    Arguments and results go through JSON, but for rows.
    """

    def __init__(self, keeper, root):
        self.layers, self.name, self.refs = keeper.layers, keeper.name, keeper.refs
        self._keeper, self._root, self.calls = keeper, root, []

    def __getattr__(self, method):
        assert method in Keeper.METHODS

        def call(*args):
            self.calls.append(method)
            if method == "restore":
                ref, start, rows = args
                return self._keeper.restore(json.loads(json.dumps(ref)), start, rows)
            path, *rest = args
            result = getattr(self._keeper, method)(str(self._root) + path, *json.loads(json.dumps(rest)))
            return result if method == "read" else json.loads(json.dumps(result))
        return call


class Stages:
    """A Runner whose sessions are saved by the stages of given layers.

    Each is on a machine of its own, the folder node0, node1, ... of root; without a root they share this machine's files.
    """

    def __init__(self, runner, layers, root=None):
        self._runner, self._layers, self._root, self.keepers = runner, layers, root, []

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def _keepers(self, caches):
        self.keepers = []
        for i, (first, stop) in enumerate(self._layers):
            keeper = Keeper({ref: cache for ref, cache in caches.items() if first <= ref.layer < stop}, (first, stop), f"stage {i + 1}")
            self.keepers.append(keeper if self._root is None else Remote(keeper, self._root / f"node{i}"))
        return self.keepers

    def save(self, path, identity, tokens, caches):
        write_parts(path, identity, tokens, self._keepers(caches))

    def saved(self, path, identity, caches, n_vocab, n_ctx):
        return opened(path, identity, caches, self._keepers(caches), n_vocab, n_ctx)


@pytest.fixture
def model(small_model, load):
    return load(small_model(**GLM), n_ctx=64)


@pytest.fixture
def staged(model):
    """staged(layers, root) -> a session that is saved and loaded by stages."""
    def make(layers=None, root=None):
        session = model.session()
        if layers is not None:
            session._runner = Stages(session._runner, layers, root)
        session.prefill(IDS[30:33])
        return session
    return make


@pytest.fixture
def talk(staged):
    """A session of 20 tokens in two stages."""
    session = staged(TWO)
    session.truncate(0)
    session.prefill(IDS[:20])
    return session


def state(session):
    return list(session.tokens), [cache.stored(session.n_past).tobytes() for cache in session.caches.values()]


def part_of(folder, layers):
    """The path of the only part with these layers in a folder."""
    found, = folder.glob(f"*.layers-{layers}.*")
    return found


@pytest.mark.parametrize("layers", [None, ONE, TWO, OTHERS, FOUR])
@pytest.mark.parametrize("saved_by", [None, TWO, FOUR])
def test_sessions_load_into_another_number_of_stages(staged, model, tmp_path, saved_by, layers):
    first, second = staged(saved_by), staged(layers)
    first.prefill(IDS[:20])
    first.save(tmp_path / "talk")
    assert len(os.listdir(tmp_path)) == 1 + len(saved_by or [])
    second.load(tmp_path / "talk")
    assert state(second) == state(first)
    assert second.decode(7).tobytes() == first.decode(7).tobytes()
    assert saved_bytes(tmp_path / "talk") == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_an_empty_session_is_saved_by_stages_too(staged, tmp_path):
    empty, other = staged(TWO), staged(OTHERS)
    empty.truncate(0)
    empty.save(tmp_path / "empty")
    other.load(tmp_path / "empty")
    assert other.tokens == []


def test_each_machine_has_its_part(staged, tmp_path):
    first, folder = staged(TWO, tmp_path), tmp_path / "driver"
    folder.mkdir()
    first.save(folder / "talk")
    assert os.listdir(folder) == ["talk"]
    part_of(tmp_path / "node0" / folder.relative_to("/"), "0-1")
    part_of(tmp_path / "node1" / folder.relative_to("/"), "2-3")
    second = staged(TWO, tmp_path)
    second.truncate(1)
    second.load(folder / "talk")
    assert state(second) == state(first)
    assert all("read" not in keeper.calls and "restore" not in keeper.calls for keeper in second._runner.keepers)


def test_rows_come_from_the_machine_that_has_them(staged, tmp_path):
    """Stages of other layers, of which one has no part, and one half of one."""
    first, folder = staged(TWO, tmp_path), tmp_path / "driver"
    folder.mkdir()
    first.prefill(IDS[:20])
    first.save(folder / "talk")
    for layers in (FOUR, OTHERS):
        second = staged(layers, tmp_path)
        second.load(folder / "talk")
        assert state(second) == state(first)
        assert sum(keeper.calls.count("restore") for keeper in second._runner.keepers) > 0
    # the parts were copied to the driver's machine, and the stages' machines are new ones
    for node, layers in (("node0", "0-1"), ("node1", "2-3")):
        part = part_of(tmp_path / node / folder.relative_to("/"), layers)
        part.rename(folder / part.name)
    for layers in (OTHERS, None):
        second = staged(layers, tmp_path / "new")
        second.load(folder / "talk")
        assert state(second) == state(first)


def test_a_save_replaces_an_older_one_with_its_parts(staged, talk, tmp_path):
    talk.save(tmp_path / "talk")
    before = set(os.listdir(tmp_path))
    talk.decode(5)
    talk.save(tmp_path / "talk")
    assert set(os.listdir(tmp_path)) & before == {"talk"} and len(os.listdir(tmp_path)) == 3
    other = staged()
    other.load(tmp_path / "talk")
    assert state(other) == state(talk)
    other.save(tmp_path / "talk")
    assert os.listdir(tmp_path) == ["talk"]
    talk.save(tmp_path / "talk")
    other.load(tmp_path / "talk")
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("broken", ["part", "head", "replace"])
def test_a_save_that_fails_leaves_the_older_one(staged, talk, tmp_path, monkeypatch, broken):
    talk.save(tmp_path / "talk")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    talk.decode(5)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "replace":
            patch.setattr(os, "replace", full)
        elif broken == "part":
            patch.setattr(type(talk.caches[next(reversed(talk.caches))]), "stored", full)
        else:
            (tmp_path / "talk.part").mkdir()
        with pytest.raises(SessionFileError, match="talk: .*(cannot be written .No space left|Is a directory)"):
            talk.save(tmp_path / "talk")
    if broken == "head":
        (tmp_path / "talk.part").rmdir()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parts_of_a_save_that_was_killed_are_removed_by_the_next(talk, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:        # neither of these runs when a process is killed
        patch.setattr(os, "replace", die)
        patch.setattr("pydsa.saved.parts._remove", lambda *args: None)
        patch.setattr("pathlib.Path.unlink", lambda *args, **options: None)
        with pytest.raises(Killed):
            talk.save(tmp_path / "talk")
    assert len(os.listdir(tmp_path)) == 3
    talk.save(tmp_path / "talk")
    assert len(os.listdir(tmp_path)) == 3 and "talk" in os.listdir(tmp_path)


def test_a_folder_that_is_missing_is_met_before_parts_are_written(talk, tmp_path):
    with pytest.raises(SessionFileError, match="missing/talk: the session cannot be written .No such file"):
        talk.save(tmp_path / "missing" / "talk")
    assert os.listdir(tmp_path) == []


# What is refused

def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def of_another_save(folder, talk):
    """Put the part of a save with other rows and equal tokens in its place."""
    part = part_of(folder, "2-3")
    other = folder / "other"
    for cache in talk.caches.values():
        cache.restore(cache.stored(20)[::-1].copy())
    talk.save(other)
    source, = folder.glob("other.layers-2-3.*")
    source.replace(part)


def rewritten(folder, talk):
    """A part with other rows, a right checksum of its own, and its own name."""
    keeper = talk._runner.keepers[1]
    for cache in talk.caches.values():
        cache.restore(cache.stored(20)[::-1].copy())
    keeper.write(str(folder / "talk"), part_of(folder, "2-3").name, 20)


def as_head(folder, talk):
    (folder / "talk").write_bytes(part_of(folder, "0-1").read_bytes())


DAMAGE = {
    "a missing part": (lambda folder, talk: part_of(folder, "2-3").unlink(), "layers 2 to 3, talk.layers-2-3.*, is on none of the"),
    "a damaged row": (lambda folder, talk: flip(part_of(folder, "2-3"), -40), "talk: stage 2: talk.layers-2-3.*: the file is damaged"),
    "a damaged header": (lambda folder, talk: flip(part_of(folder, "0-1"), len(PART) + 30), "talk: stage 1: talk.layers-0-1"),
    "a damaged head": (lambda folder, talk: flip(folder / "talk", len(HEAD) + 30), "talk: the file is"),
    "a part that is cut off": (lambda folder, talk: os.truncate(part_of(folder, "2-3"), 900), "stage 2: .* not the part that was saved"),
    "an empty part": (lambda folder, talk: os.truncate(part_of(folder, "2-3"), 0), "stage 2: .* not a part of a saved session"),
    "a head that is cut off": (lambda folder, talk: os.truncate(folder / "talk", 200), "talk: the file is incomplete"),
    "the part of another save": (of_another_save, "stage 2: .* not the part that was saved"),
    "a part of other rows": (rewritten, "stage 2: .* not the part that was saved"),
    "a part in place of the head": (as_head, "talk: this is the part of a saved session that one stage wrote"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_missing_and_mixed_parts_are_refused(staged, talk, tmp_path, damage, message):
    talk.save(tmp_path / "talk")
    damage(tmp_path, talk)
    other = staged(TWO)
    before = state(other)
    with pytest.raises(SessionFileError, match=message):
        other.load(tmp_path / "talk")
    assert state(other) == before


def forge(path, change):
    """Write a head again, with other fields and a right checksum."""
    from pydsa.saved.file import Framed, write_framed
    with open(path, "rb") as file:
        fields = Framed(path, file, HEAD).fields
    change(fields)
    write_framed(path, HEAD, fields, ())


FORGED = {
    "another model": (lambda f: f.update(model="0" * 64), "another model file"),
    "no parts": (lambda f: f.update(parts=[]), "other layers than the session"),
    "a part twice": (lambda f: f.update(parts=[f["parts"][0]] * 2), "other layers than the session"),
    "parts that are none": (lambda f: f.update(parts=[1, 2]), "damaged"),
    "parts as a text": (lambda f: f.update(parts="ab"), "damaged"),
    "a part without a file": (lambda f: f["parts"][0].pop("file"), "damaged"),
    "a part in another folder": (lambda f: f["parts"][0].update(file="../talk.layers-0-1." + "0" * 16), "damaged"),
    "a file of another name": (lambda f: f["parts"][0].update(file="passwords"), "damaged"),
    "a part of more tokens": (lambda f: f["parts"][0].update(n_tokens=21), "damaged"),
    "caches that are none": (lambda f: f["parts"][0].update(caches=[["latents", 0]]), "damaged"),
    "another size": (lambda f: f["parts"][0].update(bytes=2**70), "not the part that was saved"),
    "another checksum": (lambda f: f["parts"][0].update(sha256="00"), "not the part that was saved"),
    "a token beyond the vocabulary": (lambda f: f["tokens"].__setitem__(0, 300), "damaged"),
}


@pytest.mark.parametrize("change, message", FORGED.values(), ids=FORGED)
def test_forged_heads_are_refused(staged, talk, tmp_path, change, message):
    talk.save(tmp_path / "talk")
    forge(tmp_path / "talk", change)
    other = staged(TWO)
    before = state(other)
    with pytest.raises(SessionFileError, match=message):
        other.load(tmp_path / "talk")
    assert state(other) == before


def test_more_tokens_than_the_context_holds(small_model, load, talk, tmp_path):
    talk.save(tmp_path / "talk")
    with pytest.raises(ContextFullError, match="has 20 tokens; this context holds 16"):
        load(small_model(**GLM), n_ctx=16).session().load(tmp_path / "talk")


def test_only_parts_are_removed(talk, tmp_path):
    """Whatever the old head lists, other files stay."""
    talk.save(tmp_path / "talk")
    mine = tmp_path / ("mine.layers-0-1." + "0" * 16)
    mine.write_text("mine")
    forge(tmp_path / "talk", lambda fields: fields["parts"].append({"file": mine.name}))
    talk.save(tmp_path / "talk")
    assert mine.read_text() == "mine" and len(os.listdir(tmp_path)) == 4


# With a Pipeline, whose stages are in threads of this process

@pytest.fixture
def piped(small_model):
    """piped(stages, ...) -> a new session of a model in these stages."""
    made = []

    def make(stages, path=small_model(**GLM), **options):
        launcher = Launcher(path, stages)
        made.append(Pipeline(launcher, launcher.setup, **options))
        return Session(made[-1], made[-1].setup, made[-1].setup.tokenizer)
    yield make
    for pipeline in made:
        pipeline.close()


def test_a_pipeline_saves_and_loads(piped, small_model, load, tmp_path):
    first = piped(TWO)
    first.prefill(IDS[:20])
    first.save(tmp_path / "talk")
    assert sorted(name.split(".")[1] if "." in name else name for name in os.listdir(tmp_path)) == ["layers-0-1", "layers-2-3", "talk"]
    one = load(small_model(**GLM), kv_type="i16", **OPTIONS).session()
    for other in (piped(TWO), piped(ONE), one):
        other.prefill(IDS[30:33])
        other.load(tmp_path / "talk")
        assert state(other) == state(first)
        assert other.decode(7).tobytes() == first.decode(7).tobytes()
        first.truncate(20)
    one.save(tmp_path / "talk")
    first.truncate(3)
    first.load(tmp_path / "talk")
    assert state(first) == state(one) and os.listdir(tmp_path) == ["talk"]


def test_a_pipeline_refuses_damaged_parts(piped, tmp_path):
    first = piped(TWO)
    first.prefill(IDS[:20])
    first.save(tmp_path / "talk")
    flip(part_of(tmp_path, "2-3"), -40)
    before = state(first)
    with pytest.raises(SessionFileError, match=r"talk: Stage 2 of 2 \(layers 2-3, node .*\): talk.layers-2-3.*: the file is damaged"):
        first.load(tmp_path / "talk")
    assert state(first) == before


@pytest.mark.filterwarnings("ignore:.*It is started again")
def test_a_stage_that_is_started_again_reads_the_saved_parts(piped, tmp_path):
    first, other = piped(TWO), piped(OTHERS, resume=True)
    first.prefill(IDS[:20])
    first.save(tmp_path / "talk")
    other.load(tmp_path / "talk")
    assert other.decode(7).tobytes() == first.decode(7).tobytes()
    launcher = other._runner.launcher
    launcher.kill(0)
    assert other.decode(8).tobytes() == first.decode(8).tobytes()
    assert launcher.n_starts == [2, 1] and state(other) == state(first)
