"""The demo model: its size, its answers, its choice of keys."""
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pydsa
from pydsa.chat import encode_chat
from pydsa.cli import main
from tools import needle

SAMPLE = Path(pydsa.DEMO).parent / "notes.txt"


@pytest.fixture(scope="module")
def model():
    return pydsa.load(pydsa.DEMO, threads=1, attention="sparse")


def sample():
    """The notes, and the line that answers their question."""
    text = SAMPLE.read_text(encoding="utf-8").rstrip("\n")
    name = text.splitlines()[-1].removeprefix("What is the code of the ").removesuffix("?")
    return text, next(line for line in text.splitlines() if line.startswith(f"The code of the {name} is "))


def test_file(model):
    assert Path(pydsa.DEMO).stat().st_size < 10_000_000
    assert model.config.architecture == "deepseek32" and model.config.n_ctx_train >= 8192 and model.top_k <= 128
    assert model.config.n_expert_used < model.config.n_expert and model.config.n_layer_dense_lead == 1


def test_the_sample_is_answered(model):
    text, line = sample()
    assert len(model.tokenize(text)) > 16 * model.top_k and text.index(line) < len(text) / 2
    assert "".join(model.chat([{"role": "user", "content": text}], max_tokens=24, temperature=0)) == line


def test_llama_cpp_gives_the_same_answer(model):
    """llama.cpp gives the same answer, token by token.

    The prompt is far longer than top_k.
    """
    pytest.importorskip("llama_cpp")
    from tools.compare_llama_cpp import LlamaCpp
    text, line = sample()
    ids = encode_chat(model.tokenizer, [{"role": "user", "content": text}])
    _, picked = LlamaCpp(pydsa.DEMO, 4096, 1).run(np.array(ids), len(model.tokenize(line, add_bos=False)) + 1)
    assert picked[-1] in model.tokenizer.eog_ids and model.detokenize(picked[:-1]) == line


def test_run_without_a_model():
    result = CliRunner().invoke(main, ["run", "-f", str(SAMPLE), "--temp", "0", "-n", "24", "-t", "1"])
    assert result.exit_code == 0 and result.stdout == sample()[1]


@pytest.mark.parametrize("text,words", [("Hello", "Hello"), ("What is 2 plus 3?", "2 + 3 = 5"), ("Who are you?", "demo model of pydsa")])
def test_small_talk(model, text, words):
    assert words in "".join(model.chat([{"role": "user", "content": text}], max_tokens=32, temperature=0))


def test_the_choice_of_keys_does_the_work(model):
    """The indexer's keys find the facts in 2,048 tokens; random keys do not."""
    found = [needle.recall(model, mode, 2048, [10, 50, 90], 1, 5, 16, 128, mode == "sparse") for mode in ("sparse", "random")]
    (own, mass), (at_random, _) = found
    assert own.mean() == 1 and at_random.mean() < 0.5 and mass > 0.7


def test_bench_without_a_model():
    result = CliRunner().invoke(main, ["bench", "-p", "16", "-n", "0", "-r", "1", "-t", "1", "-o", "csv"])
    assert result.exit_code == 0 and "pydsa demo" in result.stdout
