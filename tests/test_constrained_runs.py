"""Constrained answers of models: in Python, and on the command line."""
import json
import sys

import pytest
from test_cli import pydsa, run
from test_console import Lines
from test_tool_calls import TOOLS, WRITTEN

from pydsa.cli import console
from pydsa.cli.console import Writer, answer, read_results, show
from pydsa.cli.restrictions import Restrictions
from pydsa.errors import PydsaError
from pydsa.session import Session
from pydsa.text.answers import Piece
from pydsa.text.constraint import constraint_for

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", True]}},
          "required": ["a", "b"], "additionalProperties": False}
QUESTION = {"role": "user", "content": "?"}
THINKS = "{{ messages[0].content }}{{ '<think>' if thinking else '' }}"
GLM = WRITTEN["glm-4.7"][1]


@pytest.fixture(scope="module")
def model(golden):
    return golden("ds32-q8_0")[0]


@pytest.fixture
def engine(load, model, monkeypatch):
    engine = load(model)
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    return engine


def is_valid(text):
    value = json.loads(text)
    return value.keys() == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", True)


def test_answers_by_a_schema(engine):
    for seed in range(3):
        stream = engine.chat([QUESTION], temperature=1, top_k=0, seed=seed, json_schema=SCHEMA)
        assert is_valid(stream.finish().text) and stream.reply.finish_reason == "stop"
        assert is_valid(engine.complete("?", temperature=1, top_k=0, seed=seed, json_schema=SCHEMA).text)
    assert "".join(engine.generate("?", grammar='root ::= "no" "ne"?', temperature=0)) in ("no", "none")
    assert engine.generate("?", 1, grammar='root ::= "none"').finish().finish_reason == "length"


def test_a_session_ends_where_the_grammar_does(engine):
    session, constraint = engine.session(), constraint_for(engine.tokenizer, grammar='root ::= "abc"')
    for _ in range(2):      # a constraint serves many answers
        assert engine.detokenize(list(session.generate(engine.tokenize("?"), constraint=constraint))) == "abc"


def test_reasoning_comes_before_the_answer(engine, monkeypatch):
    sampled = []

    def sample(self, logits, max_tokens=None, sampling=None, constraint=None):
        state = constraint.start()
        for token in engine.tokenize('Hm, {.</think>{"a": 1, "b": "x"}', add_bos=False):
            assert state.allowed()[token]
            state.advance(token)
            sampled.append(token)
            yield token
        assert state.finished
    monkeypatch.setattr(Session, "sample", sample)
    reply = engine.reply([QUESTION], thinking=True, json_schema=SCHEMA, template=THINKS)
    assert reply.reasoning == "Hm, {." and is_valid(reply.text) and sampled


def test_calls_are_constrained_where_tools_are_offered(engine):
    for seed in range(3):
        options = dict(tools=TOOLS, template=GLM, temperature=1, top_k=0, seed=seed, logit_bias={"<": 3.0})
        reply = engine.reply([QUESTION], tool_choice={"name": "now"}, **options)
        assert {call["function"]["name"] for call in reply.tool_calls} == {"now"} and reply.finish_reason == "tool_calls"
        both = engine.reply([QUESTION], json_schema=SCHEMA, **options | {"tools": TOOLS[1:]})
        assert both.tool_calls and not both.text.strip() or is_valid(both.text)
        assert is_valid(engine.reply([QUESTION], json_schema=SCHEMA, tool_choice="none", **options).text)
    with pytest.raises(PydsaError, match="tool_choice names 'x', expected .*: weather, now"):
        engine.chat([QUESTION], tools=TOOLS, template=GLM, tool_choice={"name": "x"})
    with pytest.raises(PydsaError, match="tool_choice asks for a call, but no tools are given"):
        engine.chat([QUESTION], tool_choice="required")
    with pytest.raises(PydsaError, match="a JSON schema and a grammar are given"):
        engine.chat([QUESTION], json_schema={}, grammar="x")


def test_without_the_library_a_sentence_says_how_to_install_it(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PydsaError, match=r"needs the package llguidance .*pip install 'pydsa\[serve\]'"):
        engine.chat([QUESTION], tools=TOOLS, template=GLM)
    engine.chat([QUESTION], 0, tools=TOOLS, template=GLM, tool_choice=None)
    engine.chat([QUESTION], 0)


# The command line

def test_run_by_a_schema_and_by_a_grammar(model, tmp_path):
    schema, grammar = tmp_path / "s.json", tmp_path / "g.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "yes" | "no"')
    for name, value in ("-j", json.dumps(SCHEMA)), ("--json-schema", schema), ("-jf", schema), ("--json-schema-file", schema):
        assert is_valid(run(model, "-p", "?", "-t", 1, "--temp", 1, name, value).stdout)
    for options in (["--grammar", 'root ::= "yes" | "no"'], ["--grammar-file", grammar, "--raw"]):
        assert run(model, "-p", "?", "-t", 1, *options).stdout in ("yes", "no")


@pytest.mark.parametrize("args, message", [
    (["-j", "{"], "-j is no JSON"), (["-j", "missing.json"], "missing.json cannot be read"), (["-jf", "BAD"], "is no JSON"),
    (["-j", "{}", "--grammar", "x"], "-j and --grammar both say"), (["-j", '{"enum":' + "[" * 9999], "is no JSON"),
    (["--grammar", "x"], "the grammar cannot be read"), (["--grammar-file", "LATIN"], "is not UTF-8 text"),
    (["--tools", "TOOLS", "--raw"], "--tools belongs to the chat format"), (["--tools", "BAD"], "is no JSON"),
    (["-jf", "\0"], "cannot be read"),
    (["--tools", "EMPTY"], "--tools has no functions"), (["--tools", "ODD"], "expected a list of dicts with a function")])
def test_mistaken_restrictions_are_met_before_the_model_is_read(args, message, tmp_path):
    files = {"BAD": b"nothing", "LATIN": b"\xe4", "EMPTY": b"[]", "ODD": b'[{"name": "f"}]', "TOOLS": json.dumps(TOOLS).encode()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    result = pydsa("run", "no-such-model.gguf", "-p", "x", *(tmp_path / arg if arg in files else arg for arg in args))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_a_schema_that_cannot_be_served_is_a_sentence(model):
    result = run(model, "-p", "x", "-j", '{"not": {}}')
    assert result.exit_code == 2 and 'Unimplemented keys: ["not"]' in result.stderr and "Traceback" not in result.stderr


def test_calls_are_lines_of_json(capsys):
    calls = [{"id": f"{i}", "type": "function", "function": {"name": "f", "arguments": '{"a": "\x1b"}'}} for i in range(2)]
    show([Piece("I look."), *(Piece("<call>", "tool_call", call) for call in calls), Piece("\n", "markup")])
    assert [json.loads(line) for line in capsys.readouterr().out.removeprefix("I look.\n").splitlines()] == calls
    show([Piece("<call>", "tool_call", calls[0])])
    out = capsys.readouterr().out
    assert json.loads(out) == calls[0] and out.isprintable() is False and out[:-1].isprintable()


def test_results_of_calls_are_typed(engine, monkeypatch, capsys):
    monkeypatch.setattr(engine.tokenizer, "chat_template", GLM)
    monkeypatch.setattr(console, "_pasted", list)
    written = iter([WRITTEN["glm-4.7"][2], "It rains."])

    def sample(self, logits, max_tokens=None, sampling=None, constraint=None):
        yield from engine.tokenize(next(written), add_bos=False, parse_special=True)
    monkeypatch.setattr(Session, "sample", sample)
    writer = Writer(engine, None, None, None, Restrictions(tools=TOOLS))
    messages = answer(engine, writer, [QUESTION], False)
    shown = [json.loads(line)["function"]["name"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert shown == ["weather", "now"]

    class Typed(Lines):
        def print(self, *texts, markup):
            pass
    assert read_results(Typed("rain", ""), messages) == [] == read_results(Typed(), [QUESTION]) == read_results(Typed(), [])
    results = read_results(Typed("rain", "noon"), messages)
    calls = messages[-1]["tool_calls"]
    assert [(m["role"], m["content"], m["tool_call_id"]) for m in results] == [
        ("tool", text, call["id"]) for text, call in zip(("rain", "noon"), calls)]
    assert answer(engine, writer, [*messages, *results], False, 2)[-1]["content"] == "It rains."
    assert answer(engine, writer, [*messages, *results, {"role": "x y"}], False, 3) == messages      # a failure takes back what is new
