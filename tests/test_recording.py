"""Recordings: what was chosen, in memory with a limit and in files."""
import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids

import pydsa
from pydsa.backends.devices import FORMS_BY_TILES
from pydsa.chat import chat_prompt
from pydsa.cli import main
from pydsa.errors import PydsaError, RecordingFileError
from pydsa.executor.hooks import Hook, layer_of
from pydsa.recordings import packed
from tools import record_cost as tool

IDS = random_ids(60)       # top_k is 12
OPS = {"indexer_select": (0,), "top_k": (0,), "moe_route": (0, 1)}


class Choices(Hook):
    """What the steps choose, in a plain way.

    seen: {(op, layer, argument): [(position, row)]}.
    """

    def __init__(self):
        self.seen = {}

    def wants(self, node):
        return node.op in OPS

    def after(self, call):
        for i in OPS[call.node.op]:
            op = "choice" if call.node.op in ("indexer_select", "top_k") else call.node.op
            self.seen.setdefault((op, layer_of(call.node), i), []).extend(zip(call.positions.tolist(), call.read(i).tolist()))


def run(session, n=34):
    """A prompt in ubatches of 16, and tokens one by one."""
    session.prefill(IDS[:24])
    for token in IDS[24:n]:
        session.decode(token)
    return session


def expected(choices, owner):
    """The rows of a layer's choice, by position."""
    return [row for _, row in choices.seen["choice", owner, 0]]


def same(a, b):
    """Whether two recordings hold the same."""
    fields = [(getattr(a, name), getattr(b, name)) for name in ("selection", "scores", "mass", "experts", "expert_weights")]
    return (a.facts == b.facts and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("positions", "tokens", "all_keys"))
            and all((x is None) == (y is None) for x, y in fields)
            and all(np.array_equal(x[i], y[i], equal_nan=x[i].dtype.kind == "f") for x, y in fields if x is not None for i in x))


@pytest.mark.parametrize("device, attention, arch", [("cpu", "sparse", "glm-dsa"), ("cpu", "masked", "deepseek32"),
                                                     ("reference", "sparse", "deepseek32")])
def test_a_recording_has_what_was_chosen(small_model, load, device, attention, arch):
    types = {"indexer_types": "FFSS"} if arch == "glm-dsa" else {}
    model = load(small_model(arch=arch, n_layer=4, **types), attention=attention, device=device, n_ubatch=16)
    session, seen = model.session(), Choices()
    session.hooks = seen,
    with session.record() as recording:
        run(session)
    assert recording.positions.tolist() == list(range(34)) and recording.tokens.tolist() == IDS[:34] and not recording.all_keys.any()
    assert recording.top_k == 12 and recording.layers == [0, 1, 2, 3] == list(recording.selection) and recording.n_left == 0
    assert recording.indexed_layers == ({0: 0, 1: 1, 2: 1, 3: 1} if types else {i: i for i in range(4)})
    for layer, owner in recording.indexed_layers.items():
        assert recording.selection[layer].tolist() == expected(seen, owner)
    assert list(recording.experts) == list(recording.expert_weights) == [1, 2, 3]
    for layer in recording.experts:
        assert [*enumerate(recording.experts[layer].tolist())] == seen.seen["moe_route", layer, 0]
        assert np.array_equal(recording.expert_weights[layer], np.float32([row for _, row in seen.seen["moe_route", layer, 1]]))
    assert recording.scores is None and recording.mass is None and recording.selection[1].dtype == np.int32
    with pytest.raises(KeyError):
        recording.experts[0]


def test_dense_steps_have_all_keys(small_model, load):
    """Up to top_k tokens; then comes a prompt in the plain form."""
    model = load(small_model(n_layer=2), n_ubatch=64)
    session, seen, plain = model.session(), Choices(), model.session()
    model.setup.schedule.costs = FORMS_BY_TILES
    session.hooks = seen,
    with session.record(mass=True, scores=True) as recording:
        logits = [session.logits(IDS[:8]), session.decode(IDS[8]), session.logits(IDS[9:])]
    assert model.setup.schedule.variant(9, 51) == "mha+choice"
    assert all(map(np.array_equal, logits, [plain.logits(IDS[:8]), plain.decode(IDS[8]), plain.logits(IDS[9:])]))
    assert recording.all_keys.tolist() == [True] * 9 + [False] * 51
    assert recording.selection[1][:9].tolist() == [[*range(i + 1)] + [-1] * (11 - i) for i in range(9)]
    assert recording.selection[1][9:].tolist() == expected(seen, 1)
    assert (recording.mass[1][:9] == 1).all() and (recording.mass[1][9:12] > 0.999).all() and 0 < recording.mass[1][-1] < 1
    assert np.isnan(recording.scores[1][:9]).all() and np.array_equal(np.isnan(recording.scores[1][9:]), recording.selection[1][9:] < 0)


def test_what_the_session_forgets_leaves(small_model, load, tmp_path):
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    fresh, path = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session(), tmp_path / "a.npz"
    with session.record() as recording, session.record(path=path):
        run(session)
        session.truncate(20)
        assert recording.positions.tolist() == list(range(20))
        assert session.reuse([*IDS[:18], 7, 8]) == 18
        session.prefill([7, 8])
    with fresh.record() as other:
        for ids in (IDS[:16], IDS[16:18], [7, 8]):
            fresh.prefill(ids)
    assert recording.tokens.tolist() == [*IDS[:18], 7, 8] and same(recording, other) and same(pydsa.Recording.open(path), other)
    fresh.save(tmp_path / "session")
    with session.record() as recording:
        session.decode(9)
        session.load(tmp_path / "session")
        assert recording.n == 0 and list(recording.selection[0]) == []
        session.decode(9)
    assert recording.positions.tolist() == [20]


def test_the_oldest_tokens_leave_where_memory_is_limited(small_model, load):
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    with session.record(limit=10_000) as recording, session.record() as whole:
        for _ in range(8):
            session.prefill(IDS[:16])
            session.prefill(IDS[:16])
            assert recording.n_bytes <= 10_000
    n = recording.n_left
    with session.record(limit=20_000) as again:     # what the session forgot takes no room
        for _ in range(20):
            session.truncate(20)
            session.prefill(IDS[:32])
    assert again.n_left == 0 and again.positions.tolist() == list(range(20, 52))
    assert 0 < n < 200 and recording.n == 256 - n and recording.positions[0] == n
    assert np.array_equal(recording.selection[1], whole.selection[1][n:]) and recording.tokens.tolist() == whole.tokens[n:].tolist()


def test_only_complete_steps_count(small_model, load):
    """A prompt that ends in the middle; then one that makes no choice."""
    class Stop(Hook):
        def wants(self, node):
            return node.name == "l_out-1"

        def after(self, call):
            raise KeyboardInterrupt

    session = load(small_model(n_layer=2), n_ubatch=64).session()
    with session.record() as recording:
        session.hooks = Stop(),
        with pytest.raises(KeyboardInterrupt):
            session.prefill(IDS)
        session.hooks = ()
        session.prefill(IDS[:10])
    assert recording.n == 10 and recording.all_keys.all()


def test_files(small_model, load, tmp_path):
    """What is saved is read back; a file is complete after an exception."""
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    with pytest.raises(KeyboardInterrupt):
        with session.record(scores=True, mass=True) as recording, session.record(scores=True, mass=True, path=tmp_path / "b.npz") as direct:
            run(session)
            with pytest.raises(PydsaError, match="still being written"):
                len(direct)
            raise KeyboardInterrupt
    recording.save(tmp_path / "a.npz")
    read = pydsa.Recording.open(tmp_path / "a.npz")
    assert same(read, recording) and same(direct, recording) and recording.n == 34
    read.save(tmp_path / "c.npz")
    assert same(pydsa.Recording.open(tmp_path / "c.npz"), recording) and read.n_bytes == (tmp_path / "a.npz").stat().st_size
    with np.load(tmp_path / "a.npz") as arrays:         # as the documentation says
        assert json.loads(arrays["recording"].tobytes())["version"] == 1 and arrays["0/tokens"].tolist() == IDS[:34]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz"]
    with pytest.raises(RecordingFileError, match="cannot be written"):
        recording.save(tmp_path / "missing" / "a.npz")
    with pytest.raises(RecordingFileError, match="cannot be read"):
        pydsa.Recording.open(tmp_path / "none.npz")


def test_a_full_disk(small_model, load, tmp_path, monkeypatch):
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()

    def full(*args):
        raise OSError(28, "No space left on device")
    with pytest.raises(RecordingFileError, match="cannot be written .No space left on device"):
        with session.record(path=tmp_path / "a.npz") as recording:
            session.prefill(IDS)
            monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    monkeypatch.undo()
    with pytest.raises(PydsaError, match="could not be written"):
        recording.n
    assert not list(tmp_path.iterdir()) and "not complete" in repr(recording) and not session.has_hooks


def test_an_interrupted_choice_is_not_that_of_the_next_step(small_model, load):
    """A dense step calls nothing of a recorder that wants no experts."""
    session, stops = load(small_model(n_layer=2), attention="auto").session(), [KeyboardInterrupt]
    session.prefill(IDS[:30])

    def interrupt(node, arrays):
        if node.name == "l_out-1" and stops:
            raise stops.pop()
    with session.record(routing=False) as recording:
        with pytest.raises(KeyboardInterrupt):
            session.prefill(IDS[30:35], observe=interrupt)
        session.truncate(0)
        session.prefill(IDS[:5])
    assert recording.all_keys.all() and recording.selection[1][4, :6].tolist() == [0, 1, 2, 3, 4, -1]


def test_tokens_that_were_forgotten_do_not_count_as_left(small_model, load):
    session = load(small_model(n_layer=2), attention="sparse").session()
    with session.record(limit=1) as recording:
        session.prefill(IDS[:60])
        assert recording.n == 60        # a chunk, of which ten are forgotten
        session.truncate(50)
        session.prefill(IDS[:40])
        assert recording.n == 40 and recording.n_left == 50


def test_files_of_others_are_not_replaced(small_model, load, tmp_path):
    model = load(small_model(n_layer=2), attention="sparse")
    notes, pipe = tmp_path / "notes.npz", tmp_path / "pipe.npz"
    notes.write_text("what was noted")
    os.mkfifo(pipe)
    recording = model.record(IDS[:3])
    for path, message in ((notes, "not a recording and would be lost"), (pipe, "no regular file"), (tmp_path, "Is a directory"),
                          ("", "Is a directory")):
        with pytest.raises(RecordingFileError, match=message):
            recording.save(path)
        with pytest.raises(RecordingFileError, match=message):
            model.record(IDS[:3], path=path)
    assert notes.read_text() == "what was noted" and pipe.is_fifo() and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "empty.npz").touch()
    recording.save(tmp_path / "empty.npz")
    model.record(IDS[:4], path=tmp_path / "empty.npz")
    assert pydsa.Recording.open(tmp_path / "empty.npz").n == 4


def test_the_model_is_not_replaced_by_its_recording(small_model, tmp_path):
    path = shutil.copy(small_model(n_layer=2), tmp_path / "model.gguf")
    size = path.stat().st_size
    done = CliRunner().invoke(main, ["run", str(path), "--raw", "-p", "a", "-n", "1", "--record", str(path)])
    assert done.exit_code and "is not a recording" in str(done.exception) + done.output and path.stat().st_size == size


def rewritten(source, target, change):
    """A copy of a zip: change(name, bytes) -> bytes, or None to leave an entry out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def array(values):
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


def with_header(**fields):
    def change(name, data):
        if name != "recording.npy":
            return data
        header = json.loads(data[data.index(b"\n") + 1:])
        return array(np.frombuffer(json.dumps(header | fields).encode(), np.uint8))
    return change


def with_array(name, values):
    return lambda other, data: array(values) if other == f"{name}.npy" else data


@pytest.mark.parametrize("change, message", [
    (with_header(version=2), "its version is 2, expected 1"), (with_header(top_k=0), "header is not valid"),
    (with_header(n_layer=10**9), "header is not valid"), (with_header(indexed_layers=[1, 1]), "header is not valid"),
    (with_header(fields=["selection", "mass", "routing"]), "does not have the arrays"),
    (with_header(fields=["scores"]), "header is not valid"), (with_header(top_k=None, indexed_layers=None), "header is not valid"),
    (with_header(top_k=10**9), "header is not valid"), (with_header(fields=7), "header is not valid"),
    (with_header(more=1), "fields of this version"),
    (with_header(n_vocab=3), "not in the vocabulary"), (with_header(n_expert=1, n_expert_used=1), "another shape"),
    (lambda name, data: None if name == "0/tokens.npy" else data, "0/tokens is missing"),
    (lambda name, data: None if name == "kept.npy" else data, "kept is missing"),
    (lambda name, data: data[:-1] if name == "0/tokens.npy" else data, "another shape or type"),
    (with_array("0/positions", np.arange(34)[::-1].copy()), "not in the order"),
    (with_array("0/positions", np.arange(34) - 1), "cannot be"),
    (with_array("0/positions", np.zeros(10**6, np.int64)), "larger than it can be"),
    (with_array("0/tokens", np.array([{}], object)), "another shape or type"),
    (with_array("0/tokens", np.zeros(34)), "another shape or type"),
    (with_array("0/all_keys", np.ones(34, bool)), "more keys than it can have"),
    (with_array("0/selection_map", np.zeros((2, 34, 9), np.uint8)), "larger than it can be"),
    (with_array("0/selection_map", np.full((2, 34, 1), 255, np.uint8)), "another shape"),
    (lambda name, data: data[:-300] + b"\xff" * 300 if name == "0/selection_bits.npy" else data, "damaged"),
    (with_array("0/experts", np.full((1, 34, 2), 99, np.uint16)), "expert 99"),
])
def test_damaged_files_are_one_clear_sentence(small_model, load, tmp_path, change, message):
    path = tmp_path / "a.npz"
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    with session.record(path=path):
        run(session)
    with pytest.raises(RecordingFileError, match=message) as error:
        recording = pydsa.Recording.open(rewritten(path, tmp_path / "b.npz", change))
        for layer in recording.layers:
            assert recording.selection[layer].shape == (34, 12)
        assert [recording.experts[i] for i in recording.experts]
    assert str(error.value).startswith(str(tmp_path / "b.npz")) and "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 10, 300, -30, -1])
def test_truncated_files(small_model, load, tmp_path, cut):
    path = tmp_path / "a.npz"
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    with session.record(path=path):
        run(session, 26)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RecordingFileError, match="not a recording"):
        pydsa.Recording.open(path)


def test_flipped_bytes_never_crash(small_model, load, tmp_path):
    path, good = tmp_path / "a.npz", None
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    with session.record(path=path, scores=True):
        run(session, 26)
    data, found = path.read_bytes(), 0
    for at in np.random.default_rng(0).integers(0, len(data), 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
        try:
            recording = pydsa.Recording.open(path)
            good = [field[i] for field in (recording.selection, recording.scores, recording.experts) for i in field]
        except RecordingFileError:
            found += 1
    assert found > 40 and good


def test_what_cannot_be_recorded_is_one_clear_sentence(small_model, load, tmp_path):
    dense = load(small_model(arch="deepseek2", n_layer=2)).session()
    with pytest.raises(PydsaError, match="deepseek2 has no indexer that chooses keys; record.selection=False"):
        dense.record()
    with dense.record(selection=False) as recording:
        dense.prefill(IDS[:20])
    assert recording.selection is None and recording.top_k is None and recording.all_keys.all() and recording.experts[1].shape == (20, 2)
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    for options, message in (({"selection": False, "routing": False}, "Nothing is to be recorded"), ({"limit": 0}, "limit is 0"),
                             ({"selection": False, "scores": True}, "scores are those of the selection")):
        with pytest.raises(PydsaError, match=message):
            session.record(**options)
    with pytest.raises(PydsaError, match="With attention='dense' no keys are chosen"):
        load(small_model(n_layer=2), attention="dense").session().record()
    without = load(small_model(n_layer=2, n_layer_dense=2), attention="sparse").session()
    with without.record() as recording:
        without.prefill(IDS[:20])
    recording.save(tmp_path / "a.npz")
    assert recording.experts is None and same(pydsa.Recording.open(tmp_path / "a.npz"), recording)
    with pytest.raises(PydsaError, match="routing of a model with experts"):
        without.record(selection=False)


@pytest.mark.parametrize("n, k, n_keys", [(5, 7, 3), (3, 4, 64), (1, 300, 1000), (0, 4, 9), (9, 1, 100_000)])
def test_packed_choices(n, k, n_keys):
    rng = np.random.default_rng(n)
    rows = np.full((n, k), -1, np.int32)
    for i, row in enumerate(rows):
        keys = np.sort(rng.permutation(n_keys)[:max(0, k - i)])
        row[:keys.size] = keys
    maps, bits = packed.pack(rows, n_keys)
    assert np.array_equal(packed.unpack(maps, bits, k), rows) and maps.size + bits.size <= n * (-(-n_keys // 64) + k)
    if n:
        for wrong in ((maps, bits[:-1], k), (maps, np.append(bits, bits[-1]), k), (maps, bits, 0)):
            with pytest.raises(ValueError):
                packed.unpack(*wrong)


def test_a_model_records_a_prompt_and_its_answer(small_model, load):
    model = load(small_model(n_layer=2), attention="sparse", n_ubatch=16)
    recording, session = model.record(IDS[:20], max_tokens=4, sampling=pydsa.Sampling(temperature=0)), model.session()
    answer = list(session.generate(IDS[:20], 4, pydsa.Sampling(temperature=0)))
    assert recording.tokens.tolist() == session.tokens == [*IDS[:20], *answer[:3]]      # the last token is not run
    assert model.record("ab", routing=False).tokens.tolist() == model.tokenize("ab")
    messages = [{"role": "user", "content": "ab"}]
    assert model.record(messages).tokens.tolist() == chat_prompt(model.tokenizer, messages).ids
    window = model.record(IDS[:20], select=pydsa.selections.sliding_window(2))
    assert window.selection[0][9].tolist() == [8, 9] + [-1] * 10


def test_the_command_line_records(golden, tmp_path):
    path, file = golden("ds32-q8_0")[0], tmp_path / "a.npz"
    result = CliRunner().invoke(main, ["run", str(path), "-t", "1", "-c", "200", "-p", "Hello", "-n", "5", "--record", str(file)])
    recording = pydsa.Recording.open(file)
    assert result.exit_code == 0 and recording.n > 10 and f"recorded {recording.n} tokens in" in result.stderr
    result = CliRunner().invoke(main, ["run", str(path), "-t", "1", "-p", "Hello", "--record", str(tmp_path / "none" / "a.npz")])
    assert result.exit_code == 2 and not result.stdout and "the recording cannot be written" in result.stderr
    result = CliRunner().invoke(main, ["run", str(golden("ds2-q4_0")[0]), "-t", "1", "-p", "a", "-n", "2", "--record", str(file)])
    assert result.exit_code == 0 and pydsa.Recording.open(file).selection is None


def test_the_tool_measures_the_cost(small_model):
    options = ["-d", "0,20", "-p", "16", "-n", "3", "-r", "2", "-t", "1", "-o", "json"]
    done = CliRunner().invoke(tool.main, [str(small_model(n_layer=2)), *options])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["test"], row["depth"]) for row in rows] == [("pp16", 0), ("tg3", 0), ("pp16", 20), ("tg3", 20)]
    assert all(row["off t/s"] > 0 and row["memory: bytes a token"] > 20 and row["file: bytes a token"] > 20 for row in rows)
    assert CliRunner().invoke(tool.main, [str(small_model(n_layer=2)), "-d", "a"]).exit_code == 2
