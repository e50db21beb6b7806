"""Sessions: saved, loaded, full, interrupted, shared by threads.

Wrong ids and damaged files are refused.
"""
import hashlib
import json
import os
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
from helpers import greedy, random_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pydsa import ContextFullError, PydsaError, Sampling, SessionFileError
from pydsa.saved.file import MAGIC

IDS = random_ids(60)
GREEDY = Sampling(temperature=0)
GLM = dict(arch="glm-dsa", n_layer=2, indexer_types="FS")
MODELS = [dict(), GLM, dict(arch="deepseek2")]
whole_file = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def model(small_model, load):
    return load(small_model(), n_ubatch=16)


@pytest.fixture
def session(model):
    """A session of 20 tokens, 8 more than top_k."""
    session = model.session()
    session.prefill(IDS[:20])
    return session


def state(session):
    """The whole state of a session."""
    return list(session.tokens), [cache.stored(session.n_past).tobytes() for cache in session.caches.values()]


def decoded(session, ids=IDS[20:30]):
    """The logits of further tokens, as bytes."""
    return b"".join(session.decode(token).tobytes() for token in ids)


# Saving and loading

@pytest.mark.parametrize("spec", MODELS)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "i16", "i8"])
def test_loaded_session_continues_the_same(small_model, load, tmp_path, spec, kv_type):
    model, path = load(small_model(**spec), kv_type=kv_type), tmp_path / "talk"
    first, second = model.session(), model.session()
    first.prefill(IDS[:20])
    first.save(path)
    second.prefill(IDS[30:45])
    second.load(path)
    assert state(second) == state(first)
    assert decoded(second) == decoded(first)


def test_loaded_session_continues_the_same_in_another_process(small_model, load, tmp_path):
    path, saved = small_model(), tmp_path / "talk"
    session = load(path, kv_type="i16").session()
    session.prefill(IDS[:20])
    session.save(saved)
    code = (f"import pydsa, sys\nsession = pydsa.load(sys.argv[1], n_ctx=256, threads=1).session()\nsession.load(sys.argv[2])\n"
            f"print(b''.join(session.decode(token).tobytes() for token in {IDS[20:30]}).hex())")
    run = subprocess.run([sys.executable, "-c", code, path, saved], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert bytes.fromhex(run.stdout) == decoded(session)


def test_empty_session_is_saved_too(model, session, tmp_path):
    model.session().save(tmp_path / "empty")
    session.load(tmp_path / "empty")
    assert session.n_past == 0
    np.testing.assert_array_equal(session.prefill(IDS), model.session().prefill(IDS))


def test_session_moves_between_contexts_and_devices(small_model, load, session, tmp_path):
    """A session file depends only on the model and the cache type."""
    session.save(tmp_path / "talk")
    for options in (dict(n_ctx=20), dict(n_ctx=500), dict(device="reference")):
        other = load(small_model(), **options).session()
        other.load(tmp_path / "talk")
        assert state(other) == state(session)


def test_saving_replaces_only_when_complete(small_model, session, tmp_path, monkeypatch):
    path = tmp_path / "talk"
    session.save(path)
    before = path.read_bytes()
    session.decode(5)

    def fail(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(SessionFileError, match="talk: the session cannot be written .No space left"):
            session.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["talk"]
    session.save(path)
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["talk"]
    with pytest.raises(SessionFileError, match="the session cannot be written .another file is there, and would be lost"):
        session.save(small_model())


@pytest.mark.parametrize("place", ["missing/talk", "file/talk", "taken", "n" * 300, "n" * 253, "folder", "zero\0byte", "pipe", ""])
def test_places_that_cannot_be_written(session, tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    for folder in ("taken.part", "folder"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionFileError, match="cannot be written"):
        session.save(tmp_path / place if place else "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe", "taken.part"] and (tmp_path / "pipe").is_fifo()


# Damaged files, and files of other models

@pytest.fixture(scope="module")
def saved(small_model, load, tmp_path_factory):
    """The bytes of a saved session of ten tokens, for `refuses`."""
    path = tmp_path_factory.mktemp("saved") / "talk"
    session = load(small_model(**GLM), n_ctx=32).session()
    session.prefill(IDS[:10])
    session.save(path)
    return path.read_bytes()


@pytest.fixture
def refuses(small_model, load, tmp_path):
    """refuses(data) -> the error of loading it, which changes no session."""
    session = load(small_model(**GLM), n_ctx=32).session()
    session.prefill(IDS[:3])
    before = state(session)

    def check(data, errors=(SessionFileError, ContextFullError)):
        path = tmp_path / "damaged"
        path.write_bytes(data)
        with pytest.raises(errors, match="damaged: ") as error:
            session.load(path)
        assert state(session) == before
        return str(error.value)
    return check


def forged(saved, **changes):
    """A saved session with other header values, right lengths and digest."""
    start = len(MAGIC) + 8
    end = start + int.from_bytes(saved[len(MAGIC):start], "little")
    header, rows = json.loads(saved[start:end]) | changes, saved[end:-32]
    if len(header["tokens"]) != 10:
        rows = bytes(len(rows) // 10 * len(header["tokens"]))
    header = json.dumps(header).encode()
    return MAGIC + len(header).to_bytes(8, "little") + header + rows + hashlib.sha256(header + rows).digest()


def with_header(header, length=None):
    return MAGIC + (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(32)


def test_sound_file_is_loaded(small_model, load, saved, tmp_path):
    """Sound files load, so the refusals below are for the damage."""
    session = load(small_model(**GLM), n_ctx=32).session()
    for tokens in (IDS[:10], [7] * 10, [299] * 32):
        (tmp_path / "talk").write_bytes(forged(saved, tokens=tokens))
        session.load(tmp_path / "talk")
        assert session.tokens == tokens
    assert forged(saved) == saved


def test_truncated_files_are_refused(saved, refuses):
    for n in {*range(0, 60), *range(0, len(saved), 97), *range(len(saved) - 40, len(saved))}:
        refuses(saved[:n], SessionFileError)
    refuses(saved + b"\0", SessionFileError)


@whole_file
@given(st.data())
def test_any_flipped_byte_is_noticed(saved, refuses, data):
    damaged = bytearray(saved)
    damaged[data.draw(st.integers(0, len(saved) - 1))] ^= data.draw(st.integers(1, 255))
    refuses(bytes(damaged))


@whole_file
@given(st.binary(max_size=300))
def test_any_header_is_refused(refuses, header):
    refuses(header)
    refuses(with_header(header))


FORGED = {
    "another model": (dict(model="0" * 64), "another model file"),
    "no model": (dict(model=None), "another model file"),
    "another cache type": (dict(kv_type="f16"), "another cache type"),
    "another index type": (dict(index_type="f16"), "another --index-type"),
    "another attention": (dict(attention="dense"), "another --attention"),
    "another top_k": (dict(top_k=13), "another --dsa-top-k"),
    "other caches": (dict(caches=[["latents", 0, 272]]), "another set of caches"),
    "caches of another shape": (dict(caches=7), "another set of caches"),
    "negative token": (dict(tokens=[-1] * 10), "damaged"),
    "token beyond the vocabulary": (dict(tokens=[300] * 10), "damaged"),
    "huge token": (dict(tokens=[2**70] * 10), "damaged"),
    "float token": (dict(tokens=[1.0] * 10), "damaged"),
    "bool token": (dict(tokens=[True] * 10), "damaged"),
    "token in a list": (dict(tokens=[[1]] * 10), "damaged"),
    "tokens as text": (dict(tokens="0123456789"), "damaged"),
    "tokens as a map": (dict(tokens={str(i): i for i in range(10)}), "damaged"),
}


@pytest.mark.parametrize("changes, message", FORGED.values(), ids=FORGED)
def test_forged_files_are_refused(saved, refuses, changes, message):
    assert message in refuses(forged(saved, **changes), SessionFileError)


def test_more_tokens_than_the_context_holds(saved, refuses):
    assert "has 33 tokens; this context holds 32" in refuses(forged(saved, tokens=[1] * 33), ContextFullError)


HEADERS = {
    "empty": b"", "not JSON": b"{", "not text": b"\xff\xfe", "a list": b"[]", "a number": b"1e999", "null": b"null", "no keys": b"{}",
    "deeply nested": b"[" * 100_000, "an endless number": b"1" * 5000, "NaN": b"NaN",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_are_none(refuses, header):
    refuses(with_header(header), SessionFileError)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_are_none(refuses, length):
    refuses(with_header(b"{}", length), SessionFileError)


OTHERS = {
    "weights": (dict(seed=1), {}, "another model file"),
    "RoPE with equal weights": (dict(freq_base=500.0), {}, "another model file"),
    "scale of the experts with equal weights": (dict(expert_weights_scale=1.5), {}, "another model file"),
    "cache type": ({}, dict(kv_type="bf16"), "another cache type"),
    "type of index keys": ({}, dict(index_type="bf16"), "another --index-type"),
    "attention": ({}, dict(attention="dense"), "another --attention"),
    "top_k": ({}, dict(dsa_top_k=13), "another --dsa-top-k"),
}


@pytest.mark.parametrize("spec, options, message", OTHERS.values(), ids=OTHERS)
def test_sessions_of_other_models_are_refused(small_model, load, session, tmp_path, spec, options, message):
    other = load(small_model(**spec), **options).session()
    other.prefill(IDS[:5])
    other.save(tmp_path / "talk")
    before = state(session)
    with pytest.raises(SessionFileError, match=message):
        session.load(tmp_path / "talk")
    assert state(session) == before


def test_files_that_cannot_be_read(session, tmp_path):
    for name in ("missing", ".", "n" * 300, "zero\0byte"):
        with pytest.raises(SessionFileError, match="cannot be read"):
            session.load(tmp_path / name)


# Ids and the length of the context

WRONG_IDS = {
    "negative": [3, -1], "too large": [3, 300], "huge": [2**40], "beyond 64 bits": [2**70], "float": [1.0], "bool": [True],
    "text": ["a"], "string": "abc", "None": None, "empty": [], "two-dimensional": [[1, 2]], "ragged": [[1], [2, 3]], "number": 5,
    "negative array": np.array([-1], np.int8), "large unsigned": np.array([2**63], np.uint64),
}


@pytest.mark.parametrize("ids", WRONG_IDS.values(), ids=WRONG_IDS)
def test_wrong_ids_are_refused(model, session, ids):
    before = state(session)
    for append in (session.prefill, session.logits, model.logits):
        with pytest.raises(PydsaError, match="[Tt]oken id"):
            append(ids)
    assert state(session) == before


@pytest.mark.parametrize("token_id", [-1, 300, 2**70, 1.0, True, "a", None, [1], [[1], [2, 3]]])
def test_wrong_id_is_refused(session, token_id):
    before = state(session)
    with pytest.raises(PydsaError, match="[Tt]oken id"):
        session.decode(token_id)
    assert state(session) == before


@pytest.mark.parametrize("kind", [list, tuple, *(lambda ids, t=t: np.array(ids, t) for t in ("int16", "uint16", "int64", "uint64"))])
def test_ids_of_any_integer_type(model, session, kind):
    np.testing.assert_array_equal(session.prefill(kind(IDS[20:30])), model.session().logits(IDS[:30])[-1])


def test_full_context(small_model, load):
    model = load(small_model(), n_ctx=40, n_ubatch=16)
    session, whole = model.session(), load(small_model()).logits(IDS[:40])
    session.prefill(IDS[:30])
    with pytest.raises(ContextFullError, match="holds 40 tokens; 30 are in use and 11 more do not fit"):
        session.prefill(IDS[:11])
    assert session.n_past == 30
    np.testing.assert_array_equal(session.prefill(IDS[30:39]), whole[38])
    np.testing.assert_allclose(session.decode(IDS[39]), whole[39], rtol=1e-4, atol=1e-4)
    for append in (lambda: session.decode(1), lambda: session.logits([1]), lambda: next(session.generate([1], sampling=GREEDY))):
        with pytest.raises(ContextFullError):
            append()
    assert session.n_past == 40
    session.truncate(39)
    np.testing.assert_allclose(session.decode(IDS[39]), whole[39], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [-1, 21, 2**70, 1.5, "3", None])
def test_truncating_to_what_is_not_there(session, n):
    with pytest.raises(PydsaError, match="has 20 tokens; it cannot be truncated"):
        session.truncate(n)
    assert session.n_past == 20


def test_progress_of_prefill(model):
    """Progress counts tokens, and is reported after each layer."""
    calls, seen = [], []
    model.session().prefill(IDS[:40], lambda *call: calls.append(call), lambda node, arrays: seen.append(node.name))
    done = [n for n, _ in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 40 and len(set(done)) == 1 + 3 * model.config.n_layer
    assert {total for _, total in calls} == {40} and "result_output" in seen


# Interruptions

@pytest.mark.parametrize("node", [0, 20, -1])
def test_interrupted_prefill_continues(model, node):
    """An interrupted ubatch is not in the context; earlier ones are."""
    graph = model.setup.layouts[model.setup.schedule.variant(16, 16)].graph
    name, session, seen = [n.name for n in graph.nodes if not n.for_outputs][node], model.session(), []

    def interrupt(node, arrays):
        seen.append(node.name)
        if session.n_past == 16 and node.name == name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(IDS, observe=interrupt)
    assert session.tokens == IDS[:16] and seen[-1] == name
    np.testing.assert_array_equal(session.prefill(IDS[16:]), model.session().prefill(IDS))


def test_interrupted_by_progress(model):
    session = model.session()

    def interrupt(done, total):
        if done > 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(IDS, progress=interrupt)
    assert session.n_past == 32
    np.testing.assert_array_equal(session.prefill(IDS[32:]), model.session().prefill(IDS))


@pytest.mark.parametrize("same", [True, False])
def test_running_inside_a_step_is_refused(model, session, same):
    """A step inside a step is refused: the buffers hold the outer values."""
    inner = session if same else model.session()

    def run(node, arrays):
        inner.decode(1)

    with pytest.raises(PydsaError, match="inside a function that a step calls"):
        session.prefill(IDS[20:], observe=run)
    assert session.tokens == IDS[:20]
    np.testing.assert_array_equal(session.prefill(IDS[20:]), model.logits(IDS)[-1])


# Generating

def test_generate_is_greedy_decoding(model, session):
    again = model.session()
    expected = greedy(again, again.prefill(IDS[:30]), 10)
    assert list(session.generate(IDS[20:30], 10, GREEDY)) == expected
    assert session.tokens == IDS[:30] + expected[:9]    # the last token is appended when the next one is asked for


@pytest.mark.parametrize("n", [0, 1, 3])
def test_generate_stops_at_max_tokens(model, session, n):
    assert len(list(session.generate([5], n, GREEDY))) == n
    assert session.n_past == 21 + max(0, n - 1)


@pytest.mark.parametrize("n", [-1, 1.5, "3"])
def test_impossible_max_tokens(session, n):
    with pytest.raises(PydsaError, match="max_tokens"):
        next(session.generate([5], n, GREEDY))


def test_generate_stops_at_the_end_of_a_turn(model, session, monkeypatch):
    again = model.session()
    tokens = greedy(again, again.prefill(IDS[:30]), 12)
    last = tokens[7]
    monkeypatch.setattr(session, "_eog_ids", frozenset({last}))
    expected = tokens[:tokens.index(last)]
    assert list(session.generate(IDS[20:30], 12, GREEDY)) == expected
    assert session.tokens == IDS[:30] + expected


def test_generate_fills_the_context(small_model, load):
    model = load(small_model(), n_ctx=25)
    expected = list(load(small_model()).session().generate(IDS[:20], 6, GREEDY))
    session, tokens = model.session(), []
    with pytest.raises(ContextFullError):
        for token in islice(session.generate(IDS[:20], sampling=GREEDY), 20):
            tokens.append(token)
    assert tokens == expected and session.tokens == IDS[:20] + expected[:5]


def test_sampling_is_repeatable(model):
    """One seed gives one text; another seed gives another."""
    one, again, other = (list(model.session().generate(IDS[:10], 20, Sampling(temperature=1.5, seed=seed))) for seed in (1, 1, 2))
    assert one == again != other


# Threads

def test_two_threads_with_a_session_each(model):
    prompts = [random_ids(30, seed) for seed in (1, 2)]

    def alone(ids):
        session = model.session()
        return [session.prefill(ids), *(session.decode(token) for token in ids)]

    expected, met = [alone(ids) for ids in prompts], [None, None]

    def work(i):
        met[i] = alone(prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(met, expected)
