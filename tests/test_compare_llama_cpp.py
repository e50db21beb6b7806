"""tools/compare_llama_cpp.py: its measures, messages and tables.

The comparison itself runs where llama-cpp-python is installed.
"""

import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from pydsa.bench import Bench, reach_depth
from tools import llama_cpp_speed
from tools.compare_llama_cpp import LlamaCpp, continuation, differences, main, perplexity
from tools.llama_cpp_speed import LlamaSession, best_seconds, compare_speed, conditions
from tools.make_model import ModelSpec, make_model

ARCHITECTURES = ["deepseek32", "glm-dsa", "deepseek2"]


def test_differences():
    b = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    a = b.copy()
    a[2, 7] += 3
    a[3] += 2
    found = differences(a, b)
    energy = (b.astype(np.float64)**2).sum(axis=1)
    assert found["NMSE"] == pytest.approx([0, 0, 9 / energy[2], 160 / energy[3], 0], rel=1e-5)
    assert found["largest difference"] == pytest.approx([0, 0, 3, 2, 0], rel=1e-5)
    assert found["KL divergence"][[0, 1, 4]] == pytest.approx(0, abs=1e-12)
    assert found["KL divergence"][2] > 0.01
    assert found["KL divergence"][3] == pytest.approx(0, abs=1e-6)    # the divergence does not depend on a shift of all logits


def test_perplexity():
    assert perplexity(np.zeros((6, 50)), [1, 2, 3, 4, 5, 6]) == pytest.approx(50)
    logits = np.full((3, 8), -1e9)
    logits[[0, 1, 2], [5, 6, 7]] = 0
    assert perplexity(logits, [1, 5, 6]) == pytest.approx(1)


def test_continuation():
    class Model:
        def detokenize(self, ids):
            return "".join(map(str, ids))

    assert continuation(Model(), [1, 2, 3], [1, 2, 3]) == "'123'"
    assert continuation(Model(), [1, 2, 3], [1, 5, 3]) == "'123'\n(differs from token 1)"


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "model.gguf").touch()
    result = CliRunner().invoke(main, [str(tmp_path / "model.gguf")])
    assert result.exit_code == 2
    assert result.output == "llama-cpp-python is not installed: pip install llama-cpp-python, then run this again.\n"


@pytest.mark.parametrize("args, message", [
    (["--speed", "-l", "9"], "--length has no use with --speed."),
    (["--n-depth", "9"], "--n-depth needs --speed."),
    (["--repack"], "--repack needs --speed."),
])
def test_options_of_the_other_comparison(tmp_path, args, message):
    (tmp_path / "model.gguf").touch()
    result = CliRunner().invoke(main, [str(tmp_path / "model.gguf"), *args])
    assert (result.exit_code, result.output) == (2, message + "\n")


class Recorder:
    """A session that records its calls."""

    def __init__(self, name, calls):
        self.name, self.calls, self.n_past = name, calls, 0

    def truncate(self, n):
        self.n_past = n

    def prefill(self, ids):
        self.calls.append(f"{self.name}{self.n_past}+{len(ids)}")
        self.n_past += len(ids)
        return np.zeros(1)

    def decode(self, token):
        return self.prefill([token])


def test_engines_take_turns():
    calls, ids = [], np.arange(20)
    best_seconds([Recorder("p", calls), Recorder("l", calls)], ids, (4, 0, 6), 2)
    assert calls == ["p0+6", "l0+6"] + ["p6+4", "l6+4"] * 3      # the depth; then a warm-up and two timed runs
    calls.clear()
    best_seconds([Recorder("p", calls), Recorder("l", calls)], ids, (0, 2, 0), 1)
    assert calls == ["p0+1", "p1+1", "l0+1", "l1+1"] * 2


def test_the_best_time_counts_and_the_first_does_not(load, small_model, monkeypatch):
    seconds = iter([1.0, 0.5, 8.0, 4.0, 2.0, 5.0])       # of the two sessions, alternating
    monkeypatch.setattr(llama_cpp_speed, "time_test", lambda *args: next(seconds))
    monkeypatch.setattr(llama_cpp_speed, "LlamaSession", lambda peer: Recorder("l", []))
    rows = list(compare_speed(load(small_model(), device="reference"), None, Bench([16], [], [0], 2)))
    assert rows == [{"test": "pp16", "pydsa t/s": "8.00", "llama.cpp t/s": "4.00", "ratio": "2.00"}]


def test_conditions(load, small_model, monkeypatch):
    monkeypatch.setattr(llama_cpp_speed, "version", lambda name: f"1.{len(name)}")
    model = load(small_model())
    line = conditions(model, repack=False)
    assert re.match(r".+; 1 thread; pydsa \d.*, numba 1.5, llama-cpp-python 1.16; model.gguf, [\d.]+ [KM]iB, F32; f16 caches", line)
    assert line.endswith("without repacked weights (use_extra_bufts off).") and "\n" not in line
    monkeypatch.setattr(model, "threads_batch", 8)
    assert "; 1 thread (8 for prompts); " in conditions(model, repack=False)
    assert conditions(model, repack=True).endswith("with repacked weights (use_extra_bufts on).")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F32", "Q4_K_M"])
def test_llama_cpp_agrees_with_itself(tmp_path, arch, kind):
    """llama.cpp loads what make_model writes.

    A batch and single tokens give the same logits, if the weights are exact.
    """
    pytest.importorskip("llama_cpp")
    peer = LlamaCpp(make_model(tmp_path / "model.gguf", ModelSpec(arch=arch, type=kind)), 256, threads=2)
    ids = np.random.default_rng(0).integers(3, peer.n_vocab - 4, 100).tolist()
    whole, _ = peer.run(ids, 0)
    assert whole.shape == (100, 512) and len(set(whole.argmax(axis=1))) > 50
    peer = LlamaCpp(tmp_path / "model.gguf", 256, threads=2)
    single = np.concatenate([peer.decode([token], i) for i, token in enumerate(ids)])
    assert np.median(differences(single, whole)["NMSE"]) < (1e-10 if kind == "F32" else 1e-2)
    assert peer.tokenize("import")[0] == 0


def test_llama_cpp_cannot_load(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match="llama.cpp cannot run .*model.gguf: .*(failed|error)"):
        LlamaCpp(tmp_path / "model.gguf", 256, threads=1)


# llama.cpp does not read YaRN's log multiplier for glm-dsa; its published models have no YaRN.
OPTIONS = {"glm-dsa": dict(rope_scaling="absent", freq_base=1e6)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pydsa_agrees_with_llama_cpp(tmp_path, arch):
    pytest.importorskip("llama_cpp")
    path = make_model(tmp_path / "model.gguf", ModelSpec(arch=arch, type="F32", **OPTIONS.get(arch, {})))
    result = CliRunner().invoke(main, [str(path), "-l", "150", "-n", "8", "-t", "2"])
    assert result.exit_code == 0, result.output
    assert "150 of 150 positions (100.0%)" in result.output and "differs from" not in result.output


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_speed(tmp_path, arch):
    pytest.importorskip("llama_cpp")
    path = make_model(tmp_path / "model.gguf", ModelSpec(arch=arch))
    lists = ("--n-prompt", "8,4", "--n-gen", "3", "--n-depth", "0,70")
    result = CliRunner().invoke(main, [str(path), "--speed", *lists, "-r", "1", "-t", "1"])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if line.startswith("|")]
    assert rows[0] == ["test", "pydsa t/s", "llama.cpp t/s", "ratio"]
    assert [row[0] for row in rows[2:]] == ["pp8", "pp4", "tg3", "pp8 @ d70", "pp4 @ d70", "tg3 @ d70"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:3])
    assert result.output.rstrip().endswith("without repacked weights (use_extra_bufts off).")


def test_a_llama_session_goes_back(tmp_path):
    """truncate leaves nothing behind in llama.cpp's context.

    The same tokens give the same logits after a detour.
    """
    pytest.importorskip("llama_cpp")
    peer = LlamaCpp(make_model(tmp_path / "model.gguf", ModelSpec(type="F32")), 256, threads=1, fast=True)
    session, ids = LlamaSession(peer), np.random.default_rng(0).integers(3, 500, 120)

    def logits():
        return np.ctypeslib.as_array(peer.api.llama_get_logits_ith(peer.context, -1), (peer.n_vocab,)).copy()

    reach_depth(session, ids, 100)
    session.decode(ids[100])
    expected = logits()
    session.truncate(80)
    session.prefill(ids[60:80])
    session.decode(ids[3])
    reach_depth(session, ids, 80)
    reach_depth(session, ids, 100)
    session.decode(ids[100])
    assert session.n_past == 101
    assert differences(logits()[None], expected[None])["NMSE"] < 1e-4
