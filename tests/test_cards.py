"""What notebooks and interpreters show: one line, or escaped HTML; showing changes nothing."""
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pydsa import Sampling, selections
from pydsa.cards import shown
from pydsa.executor.hooks import Hook
from pydsa.setup import Setup
from pydsa.terminal import harmless
from pydsa.text.answers import Reader, Reply
from pydsa.words import card_of_a_model

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """HTML as its tags and texts; unclosed tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = set(), [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def cells(thing):
    """The table of a card: {label: text}."""
    page = Page(thing._repr_html_())
    assert page.tags <= {"div", "b", "table", "tbody", "tr", "th", "td", "details", "summary", "pre"}
    labels = {text: page.texts[i + 1] for i, text in enumerate(page.texts[:-1])}
    return labels


@shown(card_of_a_model)
class SimpleModel(NamedTuple):
    """A model as its card sees it."""
    setup: Setup
    threads: int
    threads_batch: int
    stages: object = None


@pytest.fixture(scope="module")
def model(golden, load):
    return load(golden("ds32-q8_0")[0], kv_type="i16", device="reference")      # which compiles nothing


def test_a_model_and_its_setup(model):
    line, shown = repr(model), cells(model)
    assert line.startswith(f"<pydsa.Model: {model.config.name!r}, deepseek32 Q8_0, ") and line.endswith("n_ctx=256, on reference>")
    assert shown["name"] == model.config.name and shown["file"].endswith("ds32-q8_0.gguf")
    assert shown["attention"] == "dense up to 64 tokens, where it is exact, sparse with 64 keys beyond"
    assert shown["context"].startswith("256 tokens") and shown["caches"].startswith("latents i16, index keys i8")
    assert shown["layers"] == "3, 2 of 4 experts" and " M" in shown["parameters"]
    setup = cells(model.setup)
    assert setup["attention"] == shown["attention"] and {"weights in the mapped file", "caches of a session"} <= setup.keys()
    assert repr(model.setup).startswith("<pydsa.Setup: ")


def test_threads_and_models_without_an_indexer(small_model, model):
    assert cells(model)["device"] == "reference"
    setup = Setup(small_model(n_layer=2))
    assert repr(SimpleModel(setup, 2, 4)).endswith("n_ctx=128, on cpu, 2 threads (4 for prompts)>")
    dense = cells(Setup(small_model(arch="deepseek2", n_layer=2)))
    assert dense["attention"].startswith("dense (the model has no indexer)")


def test_a_session(model):
    session, ids = model.session(), np.arange(60) % model.config.n_vocab
    assert repr(session) == "<pydsa.Session: 0 of 256 tokens>" and cells(session)["caches"].startswith("0 B of ")
    session.prefill(ids)
    session.hooks = Hook(),
    shown, text = cells(session), model.detokenize(ids[-48:].tolist())
    assert repr(session).startswith("<pydsa.Session: 60 of 256 tokens, hooks: Hook, …") and "\n" not in repr(session)
    assert shown["context"] == "60 of 256 tokens" and shown["hooks"] == "Hook"
    assert shown["the last 48 tokens"] == harmless(text)
    assert session.n_past == 60
    session.select = selections.sliding_window(5)
    assert "select: sliding_window(5), …" in repr(session) and cells(session)["select"] == "sliding_window(5)"


def test_a_recording(model, tmp_path):
    session = model.session()
    with session.record(path=tmp_path / "recording") as recording:
        assert "still being written" in repr(recording) and cells(recording)["state"] in repr(recording)
    with session.record() as recording:
        assert repr(recording).startswith("<pydsa.Recording: 0 tokens, selection, routing, ")
        session.prefill(np.arange(70))
    shown = cells(recording)
    assert shown["tokens"] == "70 tokens, from position 0 to 69" and shown["size"] in repr(recording)
    assert shown["model"] == f"{model.config.name}, deepseek32, attention auto on reference"
    assert shown["selection"] == "64 keys a token at most, layers 0-2" and shown["routing"] == "2 of 4 experts, layers 1-2"
    with session.record(selection=False, mass=True) as recording:
        session.decode(5)
    assert cells(recording)["tokens"] == "1 token, from position 70 to 70" and "selection" not in cells(recording)
    assert re.fullmatch(r"the chosen keys hold [\d.]+% to [\d.]+% of dense attention, by layer", cells(recording)["mass"])


def test_a_reply():
    call = {"id": "1", "type": "function", "function": {"name": "<b>f</b>", "arguments": '{"a": "<script>"}'}}
    whole = Reply("a <b>&amp;\u202e\x1b[2J", "because", [call], "tool_calls", 7, 11, None, 0.5, 2.0)
    shown = cells(whole)
    assert shown["text"] == "a <b>&amp;<U+202E>^[[2J" and shown["reasoning"] == "because"
    assert shown["call of <b>f</b>"] == '{"a": "<script>"}'
    assert shown["prompt"] == "7 tokens" and shown["generated"] == "11 tokens, the first after 0.50 s, 5.0 t/s from then on"
    assert repr(whole) == ("<pydsa.Reply: 'a <b>&amp;\\u202e\\x1b[2J', 7 characters of reasoning, calls <b>f</b>, 11 tokens, "
                           "finish_reason='tool_calls'>")
    assert cells(Reply("x", finish_reason="stop", stop="\n"))["ended"] == "the stop text '\\n' came"
    assert len(repr(Reply("x" * 10_000))) < 200 and "x" * 10_000 in Reply("x" * 10_000)._repr_html_()


def test_a_stream_is_not_read(model):
    stream = model.generate("Once", max_tokens=5, temperature=0)
    assert "nothing was generated yet" in repr(stream) and "finish()" in cells(stream)["state"] and stream.reply.n_generated == 0
    next(stream)
    seen = stream.reply.n_generated
    assert f"{seen} token" in repr(stream) and cells(stream)["ended"] == "not ended yet" and stream.reply.n_generated == seen
    whole = stream.finish()
    assert whole.n_generated == 5 and cells(stream)["ended"].startswith("cut off")
    assert whole.prompt_seconds > 0 and whole.seconds > 0


def test_waiting_is_timed_and_reading_is_not(monkeypatch, model):
    """Tokens that take a second each, read by someone who takes ten."""
    clock = [0.0]
    monkeypatch.setattr("pydsa.text.answers.time.perf_counter", lambda: clock[0])

    def ids():
        for token in 5, 6, 7:
            clock[0] += 1
            yield token
    stream = Reader(model.tokenizer).read(ids(), n_prompt=2)
    for _ in stream:
        clock[0] += 10
    assert (stream.reply.prompt_seconds, stream.reply.seconds) == (1, 2)
    assert stream.reply == Reply(stream.reply.text, finish_reason="stop", n_prompt=2, n_generated=3)


def test_sampling_shows_what_decides():
    assert repr(Sampling()) == "Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)"
    assert repr(Sampling(temperature=0)) == "Sampling(temperature=0)"
    assert repr(Sampling(temperature=0, top_k=5, seed=1)) == "Sampling(temperature=0, top_k=5, seed=1)"
    some = Sampling(min_p=0, presence_penalty=1.5, logit_bias={3: -1.0})
    assert eval(repr(some)) == some and "min_p=0, presence_penalty=1.5, logit_bias={3: -1.0}" in repr(some)
    assert "logit_bias=<99 tokens>" in repr(Sampling(logit_bias=dict.fromkeys(range(99), 1)))


def test_names_of_files_do_no_harm(small_model):
    setup = Setup(small_model(), override_kv={"general.name": "<img src=x onerror=alert(1)>\x1b[2J\u202e"})
    assert "<img" not in setup._repr_html_() and "&lt;img" in setup._repr_html_() and "\x1b" not in repr(setup) + setup._repr_html_()
    assert cells(setup)["name"].startswith("<img src=x onerror=alert(1)>")


def test_showing_needs_no_other_packages():
    code = ("import sys; from pydsa.setup import Setup; import pydsa; s = Setup(pydsa.DEMO); s._repr_html_(); repr(s); "
            "print([m for m in ('rich', 'IPython', 'numba', 'matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
