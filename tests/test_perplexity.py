"""Perplexity: llama.cpp's figures, the arithmetic in float64, tables, and what is refused."""
import json
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import random_ids

import pydsa
from pydsa import PydsaError, selections
from pydsa.cli import main
from pydsa.executor.hooks import Hook
from pydsa.quality.distributions import LikeliestRows, Rows, Threads
from pydsa.quality.perplexities import table

DATA = Path(__file__).parent / "data" / "perplexity"
LLAMA_CPP = json.loads((DATA / "llama_cpp.json").read_text())
NOTES = Path(pydsa.DEMO).with_name("notes.txt")
TEXT = NOTES.read_text(encoding="utf-8").removesuffix("\n")


class Scripted:
    """A session whose logits are a function of the tokens so far.

    The vocabulary has three tokens, of which 0 is BOS. ran: the tokens of each chunk as they were run.
    """
    select = None

    def __init__(self, n_ubatch=100, add_bos=True, shift=0.0, top_k=4):
        config = types.SimpleNamespace(n_vocab=3, top_k=top_k)
        metadata = types.SimpleNamespace(metadata=types.SimpleNamespace(path="scripted"))
        self.setup = types.SimpleNamespace(config=config, n_ctx=100, n_ubatch=n_ubatch, attention="auto", kv_type="f32", index_type="f32",
                                           device_name="none", precision="float16", file=metadata)
        self.tokenizer = types.SimpleNamespace(add_bos=add_bos, bos_id=0)
        self.shift, self.tokens, self.ran, self.steps = shift, [], [], []

    def truncate(self, n):
        self.ran += [self.tokens] if self.tokens else []
        self.tokens = self.tokens[:n]

    def prefill(self, ids):
        assert len(ids) <= self.setup.n_ubatch
        self.tokens = [*self.tokens, *map(int, ids)]
        self.steps.append(len(ids))

    def logits(self, ids, last):
        before = len(self.tokens)
        self.prefill(ids)
        return np.array([self.after(self.tokens[:before + 1 + i]) for i in range(len(ids) - last, len(ids))], np.float32)

    def after(self, tokens):
        return [np.sin(sum(tokens) + self.shift), len(tokens) / 10 + 30, np.cos(tokens[0] + 2 * tokens[-1]) * 40]


def formula(session, ids, start, n_ctx, first, bos):
    """Log-probabilities of a chunk's scored tokens, in float64."""
    chunk, log_probs = ids[start:start + n_ctx], []
    run = [0, *chunk[1:]] if bos else chunk
    for i in range(first, n_ctx - 1):
        logits = np.float64(np.float32(session.after(run[:i + 1])))
        log_probs.append(logits[chunk[i + 1]] - np.log(np.exp(logits).sum()))
    return log_probs


IDS = random_ids(47, n_vocab=3)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("n_ubatch", [100, 4])
@pytest.mark.parametrize("n_ctx", [10, 9])
def test_chunks_by_the_formula(n_ctx, n_ubatch, add_bos):
    session = Scripted(n_ubatch, add_bos)
    result = pydsa.perplexity(session, IDS, n_ctx=n_ctx)
    n = len(IDS) // n_ctx
    expected = np.array([formula(session, IDS, i * n_ctx, n_ctx, n_ctx // 2, add_bos) for i in range(n)])
    assert result.log_probs == pytest.approx(expected, abs=1e-6) and result.log_probs.shape == (n, n_ctx - 1 - n_ctx // 2)
    assert result.targets.tolist() == [IDS[i * n_ctx + n_ctx // 2 + 1:(i + 1) * n_ctx] for i in range(n)]
    assert result.ppl == pytest.approx(np.exp(-expected.mean()))
    assert result.ppl_error == pytest.approx(result.ppl * expected.std(ddof=1) / np.sqrt(expected.size))
    assert result.n_chosen == sum(top_k_exceeded >= 4 for top_k_exceeded in range(n_ctx // 2, n_ctx - 1)) * n
    assert all(len(tokens) == n_ctx - 1 and (tokens[0] == 0) >= add_bos for tokens in session.ran)     # the last is only predicted


def test_windows_by_the_formula():
    """With a stride no BOS is put first, as in llama.cpp."""
    session = Scripted()
    result = pydsa.perplexity(session, IDS, n_ctx=10, stride=3)
    expected = [formula(session, IDS, start, 10, 6, False) for start in range(0, len(IDS) - 10, 3)]
    assert result.log_probs == pytest.approx(np.array(expected), abs=1e-6) and result.n_chunks == 13


def test_steps_have_few_rows_of_logits(monkeypatch):
    """However long a chunk is: here two rows of three values."""
    monkeypatch.setattr("pydsa.quality.measurement.ROWS_BYTES", 24)
    session = Scripted()
    result = pydsa.perplexity(session, IDS, n_ctx=20)
    assert session.steps == [12, 2, 2, 2, 1] * 2
    monkeypatch.undo()
    assert np.array_equal(result.log_probs, pydsa.perplexity(session, IDS, n_ctx=20).log_probs)


def softmax(logits):
    e = np.exp(np.float64(logits) - np.float64(logits).max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_settings_are_compared_with_the_first():
    sessions = [Scripted(), Scripted(shift=0.5), Scripted(4)]
    base, other, same = pydsa.perplexity(sessions, IDS, n_ctx=10)
    assert base.kl is None and base.row()["kl"] is None and list(base.row()) == list(other.row())
    for i in range(4):
        run = [0, *IDS[10 * i + 1:10 * i + 10]]
        p, q = (softmax([session.after(run[:j + 1]) for j in range(5, 9)]) for session in sessions[:2])
        came = IDS[10 * i + 6:10 * i + 10]
        assert other.kl[i] == pytest.approx((p * np.log(p / q)).sum(axis=1), rel=1e-6, abs=1e-6)
        assert (other.same_top[i] == (p.argmax(axis=1) == q.argmax(axis=1))).all()
        assert np.exp(other.base_log_probs[i]) == pytest.approx(p[range(4), came], abs=1e-6)
    assert (same.kl == 0).all() and same.same_top.all() and same.row()["ln_ratio"] == 0 and same.row()["dp_rms"] == 0
    row, mine, theirs = other.row(), -other.log_probs.ravel(), -base.log_probs.ravel()
    cov = np.cov(mine, theirs, ddof=0) / (mine.size - 1)
    assert row["ln_ratio_error"] == pytest.approx(np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]))
    assert row["correlation"] == pytest.approx(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]))
    assert row["difference"] == pytest.approx(other.ppl - base.ppl)


@pytest.mark.parametrize("n_vocab", [7, 3000])
def test_divergences_in_float64(n_vocab):
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((2, 150, n_vocab)) * 4 + 20).astype(np.float32)
    came = rng.integers(0, n_vocab, 150)
    p, q = softmax(logits)
    with Threads(2) as threads:
        base, rows = (Rows(one, threads) for one in logits)
        log_probs, kl, same = base.compared(rows, came)
        expected = (p * np.log(p / q)).sum(axis=1)
        assert kl == pytest.approx(expected, rel=1e-6, abs=1e-6) and np.array_equal(same, p.argmax(axis=1) == q.argmax(axis=1))
        assert log_probs == pytest.approx(np.log(p[range(150), came]), abs=1e-6)
        for k in (1, 5, n_vocab):
            ids = base.likeliest(k)
            assert np.array_equal(ids, np.argsort(-logits[0], axis=1, kind="stable")[:, :k])
            some = LikeliestRows(log_probs, ids, base.of_several(ids))
            a, b = (np.take_along_axis(x, ids, axis=1) for x in (p, q))
            rest = [1 - x.sum(axis=1) if k < n_vocab else np.ones(150) for x in (a, b)]
            grouped = (a * np.log(a / b)).sum(axis=1) + rest[0] * np.log(rest[0] / rest[1])
            assert some.compared(rows, came)[1] == pytest.approx(grouped, rel=1e-5, abs=5e-5) and (grouped <= expected + 1e-9).all()
            assert some.compared(base, came)[1] == pytest.approx(0, abs=1e-6)


def test_damaged_logits_are_refused():
    with Threads(1) as threads:
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(pydsa.DamagedWeightsError, match="not finite"):
                Rows(np.array([[0, 1, 2], [0, value, 1]], np.float32), threads)


@pytest.mark.parametrize("factor, great", [(20, False), (100, True)])
def test_perplexities_greater_than_all_floats(monkeypatch, factor, great):
    """Or whose squares are: 1e189 is a float."""
    after = Scripted.after
    monkeypatch.setattr(Scripted, "after", lambda self, tokens: [factor * x for x in after(self, tokens)])
    result, other = pydsa.perplexity([Scripted(), Scripted(shift=1.0)], IDS, n_ctx=20)
    assert np.isinf(result.ppl) == great and 400 < result.nll < 4000
    row = other.row()
    assert np.isfinite([row["ln_ratio"], row["kl"], row["dp_rms"]]).all() and ("| inf ± inf |" in table([result.row(), row])) == great


@pytest.mark.parametrize("case", LLAMA_CPP["perplexity"], ids=lambda case: f"{case['model']}-{case['n_ctx']}")
def test_llama_cpps_perplexity(golden, load, case):
    """Within its printed error, and with F32 weights to five digits.

    With other weights llama.cpp rounds activations to 8 bits.
    """
    path = pydsa.DEMO if case["model"] == "demo" else golden(case["model"])[0]
    estimates = []
    result = pydsa.perplexity(load(path, n_ctx=case["n_ctx"]), TEXT, n_ctx=case["n_ctx"], n_chunks=case["n_chunks"],
                              progress=lambda done, results: estimates.append(results[0].ppl))
    assert abs(result.ppl - case["ppl"]) < case["error"] and result.ppl_error == pytest.approx(case["error"], rel=0.15)
    assert len(estimates) == len(case["estimates"]) and result.n_chosen == result.n_tokens * (case["model"] != "ds2-q4_0")
    if case["model"] == "ds32-f32":
        assert estimates == pytest.approx(case["estimates"], rel=1e-5) and result.ppl_error == pytest.approx(case["error"], rel=1e-5)
    if case["model"] == "demo":
        assert estimates == pytest.approx(case["estimates"], rel=0.015)


def test_llama_cpps_perplexity_with_a_stride(load):
    case, estimates = LLAMA_CPP["stride"], []
    pydsa.perplexity(load(pydsa.DEMO, n_ctx=1024), TEXT, n_ctx=case["n_ctx"], stride=case["stride"],
                     progress=lambda done, results: estimates.append(results[0].ppl))
    assert estimates == pytest.approx(case["estimates"], rel=0.015)


def test_the_choice_of_keys_is_worth_something(load):
    """The indexer's 128 keys are about as good as all; far fewer are not."""
    models = [load(pydsa.DEMO, n_ctx=1024, attention="dense"), load(pydsa.DEMO, n_ctx=1024), load(pydsa.DEMO, n_ctx=1024, dsa_top_k=4)]
    dense, sparse, few = pydsa.perplexity(models, TEXT, n_ctx=1024, n_chunks=1)
    assert abs(sparse.row()["ln_ratio"]) < 0.02 and sparse.kl.mean() < 0.01 and sparse.same_top.mean() > 0.95
    assert few.ppl > 1.2 * dense.ppl and few.kl.mean() > 0.1 and dense.n_chosen == 0 < few.n_chosen == sparse.n_chosen


def test_a_selection_counts(load):
    """A window, the indexer's keys by way of a function, and random ones."""
    model = load(pydsa.DEMO, n_ctx=512)
    ways = (selections.indexer, selections.sliding_window(128), selections.random())
    sessions = [model.session() for _ in ways]
    for session, way in zip(sessions, ways):
        session.select = way
    plain, same, window, chance = pydsa.perplexity([model, *sessions], TEXT, n_chunks=1)
    assert same.kl.mean() < 1e-4 < 0.01 < window.kl.mean() < chance.kl.mean() and plain.ppl < window.ppl < chance.ppl
    assert window.row()["select"] == "sliding_window(128)" and plain.row()["select"] is None
    assert "| sliding_window(128) |" in table([result.row() for result in (plain, window)])


def test_hooks_of_a_session_count(small_model, load):
    class Nothing(Hook):
        """Let the last layer add nothing to the others."""

        def wants(self, node):
            return node.name == "l_out-0"

        def before(self, call):
            call.write(1, np.zeros_like(call.read(1)))

    model, ids = load(small_model(n_layer=2), n_ctx=256), random_ids(100)
    session = model.session()
    session.hooks = (Nothing(),)
    plain, changed = pydsa.perplexity([model, session], ids, n_ctx=50)
    assert changed.kl.mean() > 1e-3 and plain.log_probs.shape == changed.log_probs.shape == (2, 24)


def test_logits_of_the_last_tokens(small_model, load):
    model, ids = load(small_model(n_layer=2), n_ctx=256, n_ubatch=16), random_ids(40)
    expected = model.logits(ids)
    for last in (1, 8, 9, 40):
        assert np.array_equal(model.session().logits(ids, last=last), expected[-last:])
    for last in (0, 41, -1):
        with pytest.raises(PydsaError, match="last is"):
            model.session().logits(ids, last=last)


@pytest.mark.parametrize("options, message", [
    (dict(n_ctx=24), "expected at least 48"), (dict(n_ctx=2), "at least 3"), (dict(n_ctx=0), "n_ctx is 0"),
    (dict(stride=512), "stride is 512"),
    (dict(n_chunks=0), "n_chunks is 0"), (dict(n_ctx=150), "holds 100")])
def test_what_is_refused(options, message):
    with pytest.raises(PydsaError, match=message):
        pydsa.perplexity(Scripted(), IDS * (8 if options.get("n_ctx") == 150 else 1), **options)


def test_what_is_refused_of_models():
    wider, session = Scripted(), Scripted()
    wider.setup.config.n_vocab = 4
    for models, text, message in (([], IDS, "one or several"), ([session, session], IDS, "only once"),
                                  ([session, wider], IDS, "one vocabulary"), (session, None, "no text"),
                                  ("model.gguf", IDS, "expected a Model")):
        with pytest.raises(PydsaError, match=message):
            pydsa.perplexity(models, text)


def command(*args, input=None):
    return CliRunner().invoke(main, ["perplexity", *map(str, args), "-t", "1"], input=input)


def test_command(load, tmp_path):
    options = ("-f", NOTES, "--chunks", 2, "--kv-type", "f32")
    result = command(*options, "--attention", "dense,sparse", "--dsa-top-k", "128,600", "-o", "json")
    rows = json.loads(result.stdout)
    assert [(row["attention"], row["top_k"], row["n_chosen"]) for row in rows] == [
        ("dense", None, 0), ("sparse", 128, 510), ("sparse", 600, 0)]
    assert rows[2]["kl"] < 1e-4 < 1e-3 < rows[1]["kl"] and rows[0]["ppl"] == pytest.approx(rows[2]["ppl"], rel=1e-3)
    assert len(json.loads(command(*options[:4], "-c", 64, "--kv-type", "i8,q8_0", "-o", "json").stdout)) == 1     # the same type
    assert "[2]" in result.stderr and "none has more keys than the top_k of 600" in result.stderr
    whole = pydsa.perplexity(load(pydsa.DEMO, n_ctx=512), TEXT, n_chunks=2)
    base = tmp_path / "base"
    assert "wrote" in command(*options, "--kl-divergence-base", base, "--top-logits", 40, "-o", "csv").stderr
    table = command("--kl-divergence", "--kl-divergence-base", base, "--kv-type", "f32").stdout
    assert f"| {whole.ppl:.4f} ± {whole.ppl_error:.4f} | 0.00000 ± 0.00000 |" in table and "100.00 ± 0.00 %" in table
    assert f"Against {base}" in table and "KL divergence, median" in table


@pytest.mark.parametrize("args, message", [
    ((), "There is no text"), (("-f", "-"), "The text is empty"), (("-f", NOTES, "-c", 2000), "expected at least 4000"),
    (("-f", NOTES, "-c", 2), "at least 3"), (("-f", NOTES, "--chunks", 0), "from 1 on"), (("--kl-divergence",), "name it with"),
    (("-f", NOTES, "--top-logits", 5), "is for a file"), (("-f", NOTES, "--attention", "full"), "'full', expected one of"),
    (("-f", NOTES, "--kv-type", "f32,f8"), "'f8', expected one of"), (("-f", NOTES, "--dsa-top-k", "x"), "expected integers"),
    (("-f", pydsa.DEMO), "The text is not UTF-8"), (("-f", NOTES, "-b", 512), "use -ub"),
    (("-f", NOTES, "--ppl-stride", 9, "--save-all-logits", "x"), "has no"), (("-f", NOTES, "--ppl-stride", 600), "fewer than the 512"),
    (("-f", NOTES, "--kl-divergence-base", "/no/such/folder/x"), "cannot be written"),
    (("-f", NOTES, "--kl-divergence-base", NOTES), "is there already: add --kl-divergence"),
    (("--kl-divergence", "--kl-divergence-base", "/no/such/file"), "cannot be read")])
def test_command_refuses(args, message):
    result = command(*args, input="")
    assert result.exit_code == 2 and message in result.stderr and not result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize("after, chunks", [(3, 2), (1, 0)])
def test_ctrl_c_shows_what_is_complete(monkeypatch, tmp_path, after, chunks):
    """And keeps it, in pydsa's own form of file."""
    calls, logits = [], pydsa.Session.logits

    def stopped(self, *args, **options):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return logits(self, *args, **options)
    monkeypatch.setattr(pydsa.Session, "logits", stopped)
    base = tmp_path / "base"
    result = command("-f", NOTES, "--kv-type", "f32", "-o", "jsonl", "--kl-divergence-base", base, "--top-logits", 3)
    assert result.exit_code == 130 and base.exists() == bool(chunks) and not list(tmp_path.glob("*.part"))
    if chunks:
        assert json.loads(result.stdout)["n_chunks"] == 2 and "stopped after 2 of 5 chunks" in result.stderr
    else:
        assert result.stdout == ""
