"""Answers as they are read: stop texts, reasoning, whole replies, and what ends them."""
import warnings
from itertools import groupby

import pytest
from chat_cases import QUESTION, small, user
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import V32
from test_tool_calls import TOOLS, WRITTEN

from pydsa.chat import chat_prompt, encode_chat
from pydsa.errors import ContextFullError, PydsaError
from pydsa.session import Session
from pydsa.text.answers import Layout, Reader, Reply, Splitter, Stops
from pydsa.text.tokenizer import CONTROL
from pydsa.text.tool_calls import FORMS

TOKENIZER = small(V32 | {"<|end|>": CONTROL}, ["t h", "th e", "Ġ w"])


def merged(pieces):
    """(kind, text) of the pieces, those of one kind together."""
    return [(kind, "".join(group)) for kind, group in groupby(pieces, lambda piece: piece.kind)]


def read(text, stop=None, layout=None, **options):
    """The Stream of an answer with this text, special tokens as tokens."""
    return Reader(TOKENIZER, stop, layout).read(iter(TOKENIZER.encode(text, parse_special=True)), **options)


# Stop texts

@pytest.mark.parametrize("text, stop, expected", [
    ("the end", "end", "the "), ("the end", ["nd", "e"], "th"), ("the end", "w", "the end"), ("then", "he", "t"), ("the w", "e w", "th"),
    ("Köln", "ö", "K"), ("Köln", "l", "Kö"), ("a😀b", "😀", "a"), ("a😀b", "b", "a😀"), ("ababac", "abac", "ab"), ("abab", "abac", "abab"),
    ("aab", "ab", "a"), ("x", "x", ""), ("", "x", ""), ("ab\n\nc", ["\n\n", "c"], "ab"), ("the end", [], "the end"),
    ("abc", ["b", "abc"], "a"), ("a<｜DSML｜", "<｜DSML｜", "a")])
def test_a_stop_text_ends_the_answer(text, stop, expected):
    stream = read(text, stop)
    assert "".join(stream) == expected == stream.reply.text and stream.reply.finish_reason == "stop"


@settings(deadline=None)
@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       cuts=st.sets(st.integers(1, 11)))
def test_stops_do_not_depend_on_the_pieces(text, stops, cuts):
    def cut_at(edges):
        reader, shown, edges = Stops(stops), "", [0, *sorted(edges), len(text)]
        for start, end in zip(edges, edges[1:]):
            piece, ended = reader.push(text[start:end])
            shown += piece
            assert text.startswith(shown) and not any(stop in shown for stop in stops)
            if ended:
                return shown
        return shown + reader.flush()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    upto = text[:min(ends, default=0)]
    expected = min((upto.removesuffix(stop) for stop in stops if upto.endswith(stop)), key=len) if ends else text
    assert cut_at(cuts) == cut_at(range(len(text))) == cut_at(()) == expected


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], 1, {"a"}, [["a"]]])
def test_a_stop_of_another_form(stop):
    with pytest.raises(PydsaError, match="stop is .*, expected a text or a list of texts"):
        Reader(TOKENIZER, stop)


def test_nothing_is_read_after_a_stop_text():
    ids = iter(TOKENIZER.encode("one two three"))
    assert "".join(Reader(TOKENIZER, "two").read(ids)) == "one "
    assert TOKENIZER.decode(ids) == " three"


# Reasoning

THINKS, BYTES = Layout(thinks=True), small({}, [])


@pytest.mark.parametrize("layout, text, expected", [
    (THINKS, "<think>a b</think>2", [("markup", "<think>"), ("reasoning", "a b"), ("markup", "</think>"), ("answer", "2")]),
    (THINKS, "\n <think>\na</think>\n2", [("markup", "\n <think>"), ("reasoning", "\na"), ("markup", "</think>"), ("answer", "\n2")]),
    (THINKS, "2 <think>x</think>", [("answer", "2 <think>x</think>")]), (THINKS, " 2", [("answer", " 2")]),
    (THINKS, "<th", [("answer", "<th")]), (THINKS, "<thing>", [("answer", "<thing>")]), (THINKS, "", []),
    (THINKS, "<think>a</thin", [("markup", "<think>"), ("reasoning", "a</thin")]),
    (Layout(opened=True), "a</think></think>2", [("reasoning", "a"), ("markup", "</think>"), ("answer", "</think>2")]),
    (Layout(opened=True), "<think>a", [("reasoning", "<think>a")]), (Layout(), "<think>a</think>2", [("answer", "<think>a</think>2")])])
@pytest.mark.parametrize("kind", ["user-defined", "control", "bytes"])
def test_reasoning_is_told_apart(layout, text, expected, kind):
    tags = {} if kind == "bytes" else {"<think>": CONTROL, "</think>": CONTROL} if kind == "control" else V32
    if layout == Layout() and kind == "control":
        expected = [("answer", "a2")]       # tags that are control tokens are hidden, as they always were
    tokenizer = small(tags, [])
    stream = Reader(tokenizer, None, layout).read(iter(tokenizer.encode(text, parse_special=True)))
    assert merged(stream) == expected
    reply = stream.reply
    for wanted, text in ("answer", reply.text), ("reasoning", reply.reasoning):
        assert text == "".join(text for kind, text in expected if kind == wanted)


@pytest.mark.parametrize("layout, text, stop, reasoning, answer, found", [
    (Layout(opened=True), "a x b</think>c x d", "x", "a x b", "c ", "x"), (Layout(opened=True), "a x", "x", "a x", "", None),
    (THINKS, "\n<think>x</think>\n\ny", ["x", "\n\n"], "x", "", "\n\n"), (THINKS, "<t x", "x", "", "<t ", "x"),
    (THINKS, "<think>a</think>b", "</think>", "a", "", "</think>"),
    (Layout(opened=True), "a</think>bx", ["</think>b", "x"], "a", "", "</think>b"),
    (Layout(opened=True, form=FORMS[0]), "x<｜DSML｜function_calls>x", "x", "x", "", "x"),
    (Layout(opened=True), "x</thi", "x", "x</thi", "", None),
    (Layout(), "<think>x", "x", "", "<think>", "x")])
def test_reasoning_is_not_searched_for_stop_texts(layout, text, stop, reasoning, answer, found):
    """It says what the answer shall not; only tags are looked for there."""
    reply = Reader(BYTES, stop, layout).read(iter(BYTES.encode(text))).finish()
    assert (reply.reasoning, reply.text, reply.stop) == (reasoning, answer, found)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from(["<think>", "</think>", *"x \n<"]), max_size=8), opened=st.booleans())
def test_what_stops_an_answer_does_not_depend_on_the_pieces(parts, opened):
    """Piece by piece, and all at once."""
    text, stops = "".join(parts), ["x", "\n<", "</think> "]

    def said(pieces):
        reader, shown = Reader(BYTES, stops, Layout(opened, True)), ""
        for piece in pieces:
            shown += reader._cut(piece)
            if reader.stopped:
                return shown, True
        return shown + reader._cut("", last=True), reader.stopped
    assert said(text) == said([text])


@pytest.mark.parametrize("form", [None, *FORMS])
def test_kinds_do_not_depend_on_the_pieces(form):
    parts = ["<think>", "</think>", *"a \n<", *(form.marks if form else ()), *(text for _, _, text in WRITTEN.values())]

    @settings(deadline=None, max_examples=60)
    @given(text=st.lists(st.sampled_from(parts), max_size=8).map("".join), cuts=st.sets(st.integers(1, 200)), opened=st.booleans())
    def check(text, cuts, opened):
        def cut_at(edges):
            splitter = Splitter(Layout(opened, True, form, TOOLS))
            edges = [0, *sorted(edge for edge in edges if edge < len(text)), len(text)]
            pieces = [piece for start, end in zip(edges, edges[1:]) for piece in splitter.push(text[start:end])] + splitter.flush()
            assert "".join(pieces) == text and all(pieces)
            return merged(pieces)
        assert cut_at(cuts) == cut_at(()) == cut_at(range(1, len(text)))

    check()


@pytest.mark.parametrize("template, thinking, opened", [
    (None, True, True), (None, False, False), ("{{ messages[0].content }}<think>\n", False, True),
    ("{{ messages[0].content }}", False, False)])
def test_the_prompt_may_have_opened_the_reasoning(template, thinking, opened):
    for question in QUESTION, user("<think>"):
        layout = chat_prompt(TOKENIZER, [question], thinking=thinking, template=template).layout
        assert (layout.opened, layout.thinks, layout.form) == (opened, True, None)
    assert not chat_prompt(small({}, []), [QUESTION], template="{{ messages[0].content }}").layout.thinks


# Replies

@pytest.mark.parametrize("text, expected", [
    ("2", {"role": "assistant", "content": "2"}),
    ("<think>a</think>2", {"role": "assistant", "content": "2", "reasoning_content": "a"})])
def test_the_message_of_a_reply(text, expected):
    assert read(text, layout=THINKS).finish().message == expected


def test_a_reply_counts_tokens_and_knows_the_limit():
    n = len(TOKENIZER.encode("the w"))
    assert read("the w", max_tokens=n, n_prompt=7).finish() == Reply("the w", "", [], "length", 7, n)
    assert read("the w", max_tokens=n + 1).finish().finish_reason == "stop"
    stream = read("the w")
    next(stream)
    assert stream.reply.finish_reason is None
    stream.close()
    assert list(stream) == []


def test_a_full_context_ends_a_reply_but_raises_in_a_stream():
    def ids(n):
        yield from TOKENIZER.encode("<thin")[:n]
        raise ContextFullError("full")
    stream = Reader(TOKENIZER, None, THINKS).read(ids(5))
    shown = []
    with pytest.raises(ContextFullError):
        shown.extend(stream)
    assert stream.reply.text == "<thin" and stream.reply.finish_reason == "length"     # also what was held back
    assert Reader(TOKENIZER).read(ids(5)).finish().text == "<thin"
    with pytest.raises(ContextFullError):
        Reader(TOKENIZER).read(ids(0)).finish()


# Model

@pytest.fixture
def model(golden, load, monkeypatch):
    """A model that writes what `model.writes` says."""
    model = load(golden("ds32-q8_0")[0])

    def sample(self, logits, max_tokens=None, sampling=None, constraint=None):
        ids = model.tokenize(model.writes, parse_special=True)
        yield from ids if max_tokens is None else ids[:max_tokens]
    monkeypatch.setattr(Session, "sample", sample)
    return model


SWITCH = "{{ messages[0].content }}{{ '<think>' if thinking else '</think>' }}{# ｜DSML｜ #}"


def test_model_reply(model):
    call = '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    model.writes = "Hm.</think>I look.\n\n" + call
    reply = model.reply([QUESTION], thinking=True, tools=TOOLS, template=SWITCH)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("I look.", "Hm.", "tool_calls")
    assert reply.tool_calls[0]["function"] == {"name": "now", "arguments": "{}"}
    assert reply.n_generated == len(model.tokenize(model.writes))
    assert reply.n_prompt == len(encode_chat(model.tokenizer, [QUESTION], thinking=True, template=SWITCH))
    assert model.reply([QUESTION], thinking=True, template=SWITCH, stop="look").text == "I "
    reply = model.reply([QUESTION], 2)
    assert reply.n_generated == 2 and reply.finish_reason == "length"
    kinds = {piece.kind for piece in model.chat([QUESTION], thinking=True, tools=TOOLS, template=SWITCH)}
    assert kinds == {"reasoning", "markup", "answer", "tool_call"}


def test_model_complete(model):
    model.writes = "one two"
    reply = model.complete("Count: ", stop=[" t"])
    assert (reply.text, reply.finish_reason, reply.n_prompt) == ("one", "stop", len(model.tokenize("Count: ")))
    assert model.complete([1, 2, 3]).text == "one two"


def test_a_stopped_chat_leaves_its_session(model):
    model.writes = "one two"
    assert "".join(model.chat([QUESTION], stop="two")) == "one "
    assert len(model._chats) == 1
    stream = model.chat([QUESTION])
    next(stream)
    assert len(model._chats) == 0
    del stream
    assert len(model._chats) == 1


def test_model_warns_where_thinking_has_no_switch(model):
    model.writes = "2"
    with pytest.warns(UserWarning, match="has no switch for thinking"):
        model.chat([QUESTION], template="{{ messages[0].content }}<think>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.chat([QUESTION], template="{{ messages[0].content }}<think>", thinking=True)


@pytest.mark.parametrize("options", [{"stop": 1}, {"max_tokens": -1}, {"logit_bias": {"": 1}}, {"logit_bias": {-1: 1}},
                                     {"temperature": -1}])
def test_options_are_checked_at_once(model, options):
    for call in (lambda: model.generate("x", **options), lambda: model.chat([QUESTION], **options)):
        with pytest.raises(PydsaError):
            call()


def test_logit_bias_takes_texts(load, golden):
    model = load(golden("ds32-q8_0")[0])
    first, *_ = model.tokenize("Hello")
    for bias in {first: 1e6}, {"Hello": 1e6}:
        ids = model.tokenize(model.complete("x", 1, temperature=0, logit_bias=bias).text)
        assert ids[0] in model.tokenize("Hello")
    likeliest = model.complete("x", 1, temperature=0).text
    for ban in False, -float("inf"):
        assert model.complete("x", 1, temperature=0, logit_bias={likeliest: ban}).text != likeliest
