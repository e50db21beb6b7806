"""What models over several devices do: golden logits, sessions, batches, hooks, recordings, interruptions.

All of it is as on one device. The reference stands in for a second device, and devices that work late (tests/late.py) for GPUs.
"""
import contextlib
import os
import queue
import signal

import late
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import greedy, nmse, random_ids
from test_damage import damaged  # noqa: F401
from test_golden import EXACT, MODELS, errors

import pydsa
from pydsa import DamagedWeightsError, selections
from pydsa.cli import main
from pydsa.engine.batch import Batch
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Finished, Request
from pydsa.executor.hooks import Hook

IDS = random_ids(50)
CLOSE = 1e-10
TWO = dict(device="reference", cpu_moe=True)
PLACEMENTS = {"experts on the CPU": TWO, "layers": dict(device="cpu,reference"), "rules": dict(override_tensor=["1.attn_=reference"])}
THREE = dict(device="late,later", tensor_split="1,2", cpu_moe=True)


@pytest.fixture
def three(monkeypatch, small_model):
    """A small model over three devices, two of which work late."""
    late.install(monkeypatch)
    model = pydsa.load(small_model(), n_ctx=100, n_ubatch=16, threads=1, kv_type="f32", **THREE)
    return model


@pytest.fixture
def alone(small_model, load):
    """The same model on one device."""
    return load(small_model(), n_ctx=100, n_ubatch=16)


@pytest.mark.parametrize("name, placement", [*((name, "experts on the CPU") for name in MODELS if name != "ds32-q8_0"),
                                             ("ds32-f32", "layers"), ("glm-q8_0", "layers"), ("ds32-f32", "rules")])
def test_golden_logits(golden, load, name, placement):
    """Prompts and single tokens keep the bounds of one device."""
    path, arrays = golden(name)
    model = load(path, **PLACEMENTS[placement])
    session = model.session()
    found = [*session.logits(arrays["tokens"][:-8]), *map(session.decode, arrays["tokens"][-8:])]
    if name == "ds32-f32":
        assert errors(found, arrays).max() <= EXACT
        assert nmse(found[-8:], model.logits(arrays["tokens"])[-8:]).max() < CLOSE
    else:
        assert np.median(errors(found, arrays)) <= 1e-6


def test_golden_text_over_three_devices(golden, monkeypatch):
    late.install(monkeypatch)
    path, arrays = golden("ds32-f32")
    session = pydsa.load(path, n_ctx=256, threads=1, kv_type="f32", **THREE).session()
    assert greedy(session, session.prefill(arrays["tokens"]), 24) == arrays["llama_cpp_greedy"].tolist()


@pytest.mark.parametrize("kv_type", ["f32", "i16"])
def test_sessions_go_on_elsewhere(small_model, load, tmp_path, kv_type):
    """A session saved with one placement goes on with another."""
    models = [load(small_model(), n_ctx=100, kv_type=kv_type, **options) for options in (dict(), dict(device="reference"),
                                                                                         *PLACEMENTS.values())]
    sessions, texts = [model.session() for model in models], []
    expected = models[0].logits(IDS[:30])[-1]
    for i, session in enumerate(sessions):
        session.prefill(IDS[:30])
        session.save(tmp_path / "session")
        other = sessions[i - 1]
        other.load(tmp_path / "session")
        texts.append(greedy(other, other.prefill(IDS[30:33]), 12))
        other.truncate(20)      # and cut
        assert nmse(other.prefill(IDS[20:30]), expected) < (CLOSE if kv_type == "f32" else 1e-6)
        other.truncate(0)
    assert all(text == texts[0] for text in texts[1:])


def test_caches_are_beside_their_layers(three):
    backends = {ref.layer: cache._backend.__name__ for ref, cache in three.session().caches.items()}
    assert backends == {0: "tests_late", 1: "tests_later", 2: "tests_later"}


def test_batches(three, alone):
    results = []
    for model in (three, alone):
        sessions, batch = [model.session() for _ in range(3)], Batch(model.runner, model.setup)
        found = [batch.run(sessions, [IDS[5 * i:5 * i + n] for i, n in enumerate((3, 1, 7))])]
        for token in IDS[20:25]:
            found.append(batch.run(sessions, [[token], [token + 1], [token + 2]]))
        results.append(np.array(found))
    assert nmse(*results).max() < CLOSE


def test_the_engine_answers(three, alone):
    """Several requests at a time get the text that they get alone."""
    heard = [queue.Queue() for _ in range(3)]
    with contextlib.closing(Engine(three, n_parallel=3)) as engine:
        for i, events in enumerate(heard):
            engine.submit(Request(IDS[:10 + 9 * i], events.put, pydsa.Sampling(temperature=0), max_tokens=8))
        ends = []
        for events in heard:
            ends.append(events.get(timeout=60))
            while not isinstance(ends[-1], Finished):
                ends[-1] = events.get(timeout=60)
    expected = [alone.complete(IDS[:10 + 9 * i], max_tokens=8, temperature=0).text for i in range(3)]
    assert [end.reply.text for end in ends] == expected


class Late(Hook):
    """Read what chosen ops wrote, at the end of a step."""
    late = True

    def __init__(self, prefixes):
        self.prefixes, self.found = prefixes, []

    def wants(self, node):
        return node.name.startswith(self.prefixes)

    def after(self, call):
        self.found.append((call.node.op, call.node.name, np.array(call.read(0), np.float64)))


def observed(model, n):
    """{(op, name): arrays of a step} in a context of IDS, and the order."""
    session, found, order = model.session(), {}, []

    def observe(node, arrays):
        order.append(node)
        found.setdefault((node.op, node.name), []).extend(np.array(a, np.float64) for a in arrays)
    session.prefill(IDS[:-n])
    session.prefill(IDS[-n:], observe=observe)
    return found, order


@pytest.mark.parametrize("n", [1, 9])
def test_observers_see_every_value(three, alone, n):
    """They see it once, when it is there, and before what reads it."""
    (found, order), (expected, _) = observed(three, n), observed(alone, n)
    assert found.keys() == expected.keys() and len({id(node) for node in order}) == len(order)
    for key, arrays in expected.items():
        for met, array in zip(found[key], arrays, strict=True):
            finite = np.isfinite(array)
            assert np.allclose(met[finite], array[finite], rtol=1e-3, atol=1e-4), key
    written = {}
    for i, node in enumerate(order):
        assert all(written.get(id(a.root), -1) < i for a in node.args[node.n_out:] if hasattr(a, "root"))
        written.update((id(a.root), i) for a in node.args[:node.n_out])


def test_late_hooks_and_hooks_that_change_values(three, alone):
    """Late ones read at the end what other values have not overwritten."""
    class Doubled(Hook):
        def wants(self, node):
            return node.name in ("ffn_out-0", "ffn_moe_out-1")

        def after(self, call):
            call.write(0, 2 * call.read(0))
    results = []
    for model in (three, alone):
        session, hook = model.session(), Late(("ffn_", "l_out", "attn_out"))
        session.prefill(IDS[:20])
        session.hooks = hook, Doubled()
        logits = [session.decode(token) for token in IDS[20:23]]
        results.append((logits, hook.found))
    assert nmse(*(logits for logits, _ in results)).max() < CLOSE
    found, expected = ({(op, name, i): array for i, (op, name, array) in enumerate(sorted(kept, key=lambda k: k[:2]))}
                       for _, kept in results)
    assert found.keys() == expected.keys() and len(found) > 60
    for key, array in expected.items():
        assert np.allclose(found[key], array, rtol=1e-3, atol=1e-4), key


def test_selections_and_recordings(three, alone):
    results = []
    for model in (three, alone):
        session = model.session()
        with session.record(mass=True, scores=True) as recording:
            session.prefill(IDS[:20])
            session.decode(IDS[20])
            session.select = selections.sliding_window(5, sinks=2)
            logits = [session.prefill(IDS[21:30]), session.decode(IDS[30])]
        results.append((recording, logits))
    (found, logits), (expected, others) = results
    assert nmse(logits, others).max() < CLOSE
    for what in ("positions", "tokens", "selection", "experts"):
        np.testing.assert_array_equal(getattr(found, what), getattr(expected, what))
    for what in ("mass", "expert_weights", "scores"):
        np.testing.assert_allclose(getattr(found, what), getattr(expected, what), rtol=1e-3, atol=1e-5)


def test_timed_steps(three, alone):
    """Each op of the step has a time; the step counts."""
    for n in (1, 9):
        session, other = three.session(), alone.session()
        session.prefill(IDS[:20])
        other.prefill(IDS[:20])
        times, expected = session.timed(IDS[20:20 + n]), other.timed(IDS[20:20 + n])
        assert sorted(node.name for node, _ in times) == sorted(node.name for node, _ in expected)
        assert all(seconds >= 0 for _, seconds in times)
        assert nmse(session.decode(7), other.decode(7)) < CLOSE


@pytest.mark.parametrize("name", ["blk.1.ffn_down_exps.weight", "blk.2.indexer.proj.weight"])
def test_damage_is_found(damaged, monkeypatch, name):  # noqa: F811
    """The error names the tensor, whichever device it is on."""
    late.install(monkeypatch)
    session = pydsa.load(damaged(name, "nan"), n_ctx=128, threads=1, **THREE).session()
    with pytest.raises(DamagedWeightsError, match=f"tensor '{name}' has"):
        next(session.generate(random_ids(100, n_vocab=250)))


@pytest.mark.parametrize("at", ["ffn_moe_out-1", "q-1"])
def test_interrupted_steps(three, alone, at, request):
    """After Ctrl-C in a step the session goes on; no copy is left under way."""
    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)       # which a shell lets programs in its background ignore
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, theirs))

    def interrupt(node, arrays):
        if node.name == at:
            signal.raise_signal(signal.SIGINT)
    session, other = three.session(), alone.session()
    for n in (9, 1):
        for some in (session, other):
            some.prefill(IDS[:12])
        with pytest.raises(KeyboardInterrupt):
            session.prefill(IDS[12:12 + n], observe=interrupt)
        assert session.n_past == 12
        found = [session.decode(token) for token in IDS[12:15]]
        assert nmse(found, [other.decode(token) for token in IDS[12:15]]).max() < CLOSE
        session.truncate(0)
        other.truncate(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_goes_on(small_model, load):
    model = load(small_model(), n_ctx=100, **TWO)
    session = model.session()
    session.prefill(IDS[:20])
    expected = model.logits(IDS[:22])[20:]
    child = os.fork()
    if not child:
        found = [session.decode(token) for token in IDS[20:22]]
        os._exit(not nmse(found, expected).max() < CLOSE)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert nmse([session.decode(token) for token in IDS[20:22]], expected).max() < CLOSE


def test_models_with_other_placements_take_turns(small_model, load, alone):
    """Step by step, in one process."""
    sessions = [load(small_model(), n_ctx=100, **options).session() for options in (dict(), *PLACEMENTS.values())]
    expected = alone.logits(IDS[:30])
    for session in sessions:
        session.prefill(IDS[:20])
    for i in range(20, 30):
        assert nmse([session.decode(IDS[i]) for session in sessions], expected[i]).max() < CLOSE


@pytest.mark.parametrize("options", [dict(mmap=False), dict(mlock=True), dict(mmap=False, mlock=True)])
def test_where_weights_are(small_model, alone, options):
    """--no-mmap and --mlock are for what the CPU reads."""
    model = pydsa.load(small_model(), n_ctx=100, threads=1, kv_type="f32", **TWO | options)
    memory = model.setup.memory
    experts = sum(tensor.data.nbytes for name, tensor in model.setup.file.tensors.items() if "_exps" in name)
    assert (memory["cpu"].mapped, memory["cpu"].copied) == ((0, experts) if not model.setup.mmap else (experts, 0))
    assert nmse(model.logits(IDS), alone.logits(IDS)).max() < CLOSE


@pytest.mark.parametrize("args, words", [
    (["trace", "-p", "The key", "-c", "64"], "| result_output "), (["trace", "-p", "a", "-c", "64", "--mlock"], "| result_output "),
    (["faithful", "-l", "100", "--samples", "32"], "Faithful"), (["imatrix", "-c", "64", "--chunks", "1", "-o"], "ffn_down_exps"),
    (["perplexity", "-c", "128", "--chunks", "1"], "| auto ")], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_commands(golden, tmp_path, args, words):
    """Commands take the options of placement."""
    text = tmp_path / "text"
    text.write_text("The notes of the seventh week tell of a kettle and of two keys. " * 12)
    files = ["-f", str(text)] if args[0] in ("faithful", "imatrix", "perplexity") else []
    args = [*args, str(tmp_path / "imatrix.gguf")] if args[-1] == "-o" else args
    command = [args[0], str(golden("ds32-q8_0")[0]), *args[1:], *files, "-t", "1", "--device", "reference", "--cpu-moe"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and words in done.output, done.output
