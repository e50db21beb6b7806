"""Constrained answers: whatever a model prefers, what comes out is valid."""
import concurrent.futures
import json
import re

import numpy as np
import pytest
from chat_cases import QUESTION, small
from test_tool_calls import ENDS, WRITTEN

from pydsa import DEMO
from pydsa.chat import chat_prompt
from pydsa.errors import PydsaError
from pydsa.sampling import Sampler, Sampling
from pydsa.text import tool_grammars
from pydsa.text.answers import Layout, Reader
from pydsa.text.constraint import compile_constraint, constraint_for
from pydsa.text.grammars import ConstraintError, grammar, json_object, json_schema
from pydsa.text.tokenizer import CONTROL, USER_DEFINED, load_tokenizer
from pydsa.text.tool_grammars import tools

PLAIN = small({"<eos>": CONTROL, "<ctl>": CONTROL}, ["t r", "tr u", "tru e", "Ċ Ċ", '" }', '1 2', '12 12'])
THINKS = Layout(opened=True, thinks=True)
STRUCTURE = {*'",:{}[]<>/\n', "true", '"}', "<eos>"}
DEFS = {"$defs": {"shade": {"enum": ["light", "dark", 3]}, "point": {
    "type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "integer", "minimum": -5, "maximum": 5}},
    "required": ["x", "y"], "additionalProperties": False}}}
PARAMETERS = DEFS | {"type": "object", "required": ["city", "days", "where", "missing"], "properties": {
    "city": {"type": "string", "description": "a name"}, "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    "unit": {"type": "string", "enum": ["C", 'F "old"']}, "where": {"$ref": "#/$defs/point"}, "shade": {"$ref": "#/$defs/shade"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "count": {"type": ["integer", "null"]}, "code": {
        "type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"}, "short": {"type": "string", "minLength": 1, "maxLength": 3}}}
OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
           {"type": "function", "function": {"name": "weatherman", "parameters": {"type": "object", "properties": {}}}},
           {"type": "function", "function": {"name": "now"}}]
NAMES = [tool["function"]["name"] for tool in OFFERED]


def walk(tokenizer, constraint, seed, n=4000, marks=()):
    """Ids that a model with random logits writes under a constraint.

    Tokens of structure come more often, and those that go on with a mark, so that the walk ends. The last id ends the turn.
    """
    state, random, ids, text = constraint.start(), np.random.default_rng(seed), [], b""
    likely = np.array([(token in STRUCTURE) * 4 + (token in marks) * 6 + (token == "Ċ") * 2 for token in tokenizer.tokens], np.float32)
    more = 1.5 * np.log(tokenizer.n_vocab / 270)        # of a large vocabulary structure is a small part
    likely[likely > 0] += more
    sampler = Sampler(Sampling(temperature=1, top_k=0, top_p=1, min_p=0, seed=seed))
    texts = list(map(tokenizer.token_bytes, range(tokenizer.n_vocab)))
    marks, follows = [mark.encode() for mark in marks], {}
    while len(ids) < n:
        logits = random.normal(size=tokenizer.n_vocab).astype(np.float32) * 2 + likely
        written = max((k for mark in marks for k in range(len(mark)) if text.endswith(mark[:k])), default=0)
        rests = tuple(mark[written:] for mark in marks if text.endswith(mark[:written]) and len(mark) > written)
        if rests not in follows:
            follows[rests] = [i for i, token in enumerate(texts) if any(rest.startswith(token) for rest in rests)]
        logits[follows[rests]] += min(12, 1 + 4 * written) + more * (written > 0)
        token = sampler.pick(logits, ids, state.allowed())
        state.advance(token)
        ids.append(token)
        text = (text + texts[token])[-64:]
        if token in tokenizer.eog_ids:
            return ids
        if state.finished:
            assert np.flatnonzero(state.allowed()).tolist() == sorted(tokenizer.eog_ids)
    raise AssertionError("the walk did not end: " + tokenizer.decode(ids)[-300:])


def text_of(tokenizer, ids, shown=frozenset()):
    """The text of ids without the last, which ends the turn."""
    decoder = tokenizer.decoder(shown)
    return "".join(map(decoder.push, ids[:-1])) + decoder.flush()


def accepts(tokenizer, constraint, text, parse_special=True):
    """How many tokens of a text a constraint lets through, and more.

    That is whether the answer may end there, or None if a token is not let through.
    """
    state, ids = constraint.start(), tokenizer.encode(text, parse_special=parse_special)
    for n, token in enumerate(ids):
        if not state.allowed()[token]:
            return n, None
        state.advance(token)
    return len(ids), bool(state.allowed()[min(tokenizer.eog_ids)])


# JSON

def is_valid(value, schema, root):
    """Whether a value is valid by the keywords that the tests use."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    kinds = {"string": str, "array": list, "object": dict, "boolean": bool, "null": type(None), "integer": int, "number": (int, float)}
    types = schema.get("type", list(kinds))
    types = types if isinstance(types, list) else [types]
    typed = any(isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool)) for name in types)
    checks = [typed, value in schema.get("enum", [value]), "anyOf" not in schema or any(is_valid(value, s, root) for s in schema["anyOf"])]
    if isinstance(value, dict) and "properties" in schema:
        declared = schema["properties"]
        checks += [is_valid(item, declared[key], root) if key in declared else schema.get("additionalProperties", True)
                   for key, item in value.items()]
        checks += [key in value for key in schema.get("required", ())]
    if isinstance(value, list):
        checks += [is_valid(item, schema.get("items", {}), root) for item in value] + [len(value) >= schema.get("minItems", 0)]
    if isinstance(value, str):
        checks += [re.search(schema.get("pattern", ""), value), schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)]
    if isinstance(value, (int, float)):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return all(checks)


@pytest.mark.parametrize("schema", [
    {"type": "object"}, PARAMETERS, {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 2} | DEFS, {"type": "number"},
    {"type": "string", "minLength": 2, "maxLength": 9}, {"enum": ["a", 1, None, {"a": [1]}]}])
def test_answers_are_valid_json_at_temperature_1(schema):
    constraint = compile_constraint(PLAIN, json_schema(schema))
    for seed in range(12):
        text = text_of(PLAIN, walk(PLAIN, constraint, seed))
        value = json.loads(text, parse_constant=lambda text: pytest.fail(text))
        assert is_valid(value, schema, schema) and "\n\n" not in text
        json.dumps(value, allow_nan=False)      # numbers are finite


def test_an_answer_ends_where_its_grammar_may_end():
    constraint = compile_constraint(PLAIN, json_object())
    assert accepts(PLAIN, constraint, '{"a": [1, 2') == (11, False) and accepts(PLAIN, constraint, '{"a": 12}')[1]
    state = constraint.start()
    for token in PLAIN.encode('{}'):
        assert not state.finished
        state.advance(token)
    assert state.finished and np.flatnonzero(state.allowed()).tolist() == sorted(PLAIN.eog_ids)
    with pytest.raises(PydsaError, match="the constraint does not allow the token 5"):
        state.advance(5)


def test_control_tokens_are_no_part_of_a_string():
    state = compile_constraint(PLAIN, json_object()).start()
    for token in PLAIN.encode('{"a'):
        state.advance(token)
    names = {PLAIN.tokens[i] for i in np.flatnonzero(state.allowed())}
    assert names.isdisjoint({"<ctl>", "<eos>"}) and names >= {"q", '"', "true"}


@pytest.mark.parametrize("digits, follows", [("1e1", True), ("1e12", False), ("-0.5E-3", True), ("1" * 39, True), ("1" * 40, False)])
def test_numbers_end(digits, follows):
    state = compile_constraint(PLAIN, json_schema({})).start()
    for token in PLAIN.encode("[" + digits):
        state.advance(token)
    allowed = state.allowed()
    assert allowed[PLAIN.tokens.index("1")] == follows and allowed[PLAIN.tokens.index("]")]
    assert not allowed[PLAIN.tokens.index("1212")] or len(digits) < 20


def test_digits_in_strings_are_no_numbers():
    constraint = compile_constraint(PLAIN, json_schema({"type": "string", "pattern": "^[a-f0-9, ]{80}$"}))
    assert accepts(PLAIN, constraint, '"a, 1' + "1" * 76 + '"')[1]


@pytest.mark.parametrize("schema, expected", [
    ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'), ({"type": "foo"}, "Invalid type: foo"), (False, "Unsatisfiable"),
    ({"$ref": "#/x"}, "Pointer '/x' does not exist"), ({"$ref": "https://example.com/x"}, "is not present"), ({"$ref": "#"}, "nothing can"),
    ({"type": "string", "pattern": "(?=x)"}, "look-around"), (7, "is of type int, expected an object"),
    ({"const": float("nan")}, "is not JSON"), ({"const": {1}}, "is not JSON"), ({"const": "x" * 300000}, "expected at most 262144"),
    (json.loads('{"items":' * 70 + "{}" + "}" * 70), "at most 64 levels"), ({"enum": [{}] * 5, "anyOf": [{}] * 50001}, "50000 values")])
def test_schemas_that_cannot_be_served(schema, expected):
    with pytest.raises(ConstraintError, match=expected):
        compile_constraint(PLAIN, json_schema(schema))


def test_a_schema_too_deep_for_python():
    schema = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ConstraintError, match="too deeply"):
        json_schema(schema)


def test_what_only_describes_is_left_out():
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "int99"}, "x-guidance": {"const": {"format": "no"}}},
              "required": ["format", "x-guidance"], "additionalProperties": False, "x-guidance": {"lenient": True}, "title": "t"}
    constraint = compile_constraint(PLAIN, json_schema(schema))
    assert accepts(PLAIN, constraint, '{"format":"x","x-guidance":{"format":"no"}}')[1]
    assert "lenient" in schema["x-guidance"] and schema["properties"]["format"]["format"] == "int99"      # the caller's stays
    with pytest.raises(ConstraintError, match="not"):
        compile_constraint(PLAIN, json_schema(schema | {"not": {}}))


# Grammars

def test_grammars_of_llama_cpp_and_of_lark():
    for text in 'root ::= "yes" | no [0-9]+\nno ::= "no "', 'start: "yes" | "no " /[0-9]+/':
        constraint = compile_constraint(PLAIN, grammar(text))
        texts = {text_of(PLAIN, walk(PLAIN, constraint, seed)) for seed in range(20)}
        assert "yes" in texts and len(texts) > 3 and all(re.fullmatch("yes|no [0-9]+", text) for text in texts)


@pytest.mark.parametrize("text, expected", [
    ("", "expected a text in GBNF"), (3, "expected a text in GBNF"), ("x", "cannot be read"), ('root ::= "\\', "cannot be read"),
    ('root ::= x', "Rule 'x' not found"), ("start: x", "x"), ("root ::= " + "(" * 9000, "cannot be read"), ("x" * 40000, "at most 32768")])
def test_grammars_that_cannot_be_served(text, expected):
    with pytest.raises(ConstraintError, match=expected):
        compile_constraint(PLAIN, grammar(text))


# Reasoning

@pytest.mark.parametrize("rule", [json_object(), grammar('root ::= "{" "}"')])
def test_reasoning_is_free_and_the_constraint_holds_after_it(rule):
    tokenizer = small(ENDS, [])
    opened = compile_constraint(tokenizer, rule, THINKS)
    for text, end in (("Hm {] <eos", None), ("Hm</think>{}", True), ("Hm</think>\n\n{}", True), ("Hm</think>\n", False)):
        n, may_end = accepts(tokenizer, opened, text)
        assert n == len(tokenizer.encode(text, parse_special=True)) and bool(may_end) == bool(end)
    assert accepts(tokenizer, opened, "Hm</think>x")[1] is None
    asked = compile_constraint(tokenizer, rule, Layout(thinks=True), thinking=True)
    off = compile_constraint(tokenizer, rule, Layout(thinks=True))
    assert accepts(tokenizer, asked, "<think>x</think>{}")[1] and accepts(tokenizer, asked, "{}")[1]
    assert accepts(tokenizer, off, "<think>") == (0, None) and accepts(tokenizer, off, "{}")[1]


def test_tags_of_reasoning_are_no_part_of_the_answer():
    tokenizer = small({"<eos>": CONTROL, "<think>": CONTROL, "</think>": CONTROL}, [])
    constraint = compile_constraint(tokenizer, json_object(), THINKS)
    for text in ('x</think>{"a</think>', 'x</think>{"a<think>'):
        assert accepts(tokenizer, constraint, text) == (len('{"a') + 2, None)
    assert accepts(tokenizer, constraint, 'x</think>{"a</think>": 1}', parse_special=False)[1]       # as characters it is text


def test_threads_share_a_constraint():
    constraint = compile_constraint(PLAIN, json_schema(PARAMETERS))
    alone = [walk(PLAIN, constraint, seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: walk(PLAIN, constraint, seed), range(8))) == alone


# Calls of tools

def case(name, controls=False, **options):
    """(tokenizer, layout) of a family; controls: its marks are control tokens."""
    special, template, _ = WRITTEN[name]
    special = special | {"<think>": USER_DEFINED, "</think>": USER_DEFINED}
    special |= {mark: CONTROL for mark in special if len(mark) > 1 and controls}
    tokenizer = small(special, [], **({} if "<eos>" in special else {"eos_token_id": 256}))
    return tokenizer, chat_prompt(tokenizer, [QUESTION], tools=options.pop("offered", OFFERED), template=template, **options).layout


def calls_of(tokenizer, layout, ids):
    """The Reply of the ids of an answer."""
    return Reader(tokenizer, None, layout).read(iter(ids[:-1])).finish()


def check_calls(reply, n_least=1):
    """Each call has the name of a tool, and arguments by its schema."""
    assert len(reply.tool_calls) >= n_least, reply
    for call in reply.tool_calls:
        function = call["function"]
        schema = {tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"}) for tool in OFFERED}[function["name"]]
        arguments = json.loads(function["arguments"], parse_constant=lambda text: pytest.fail(text))
        assert is_valid(arguments, schema, schema), arguments


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_the_constraint_lets_through_parses(name, controls):
    tokenizer, layout = case(name, controls)
    marks = set(layout.form.marks)
    required = compile_constraint(tokenizer, tools(layout, "required"), layout)
    for seed in range(4):
        reply = calls_of(tokenizer, layout, walk(tokenizer, required, seed, marks=marks))
        check_calls(reply)
        assert reply.text.strip() == "" and reply.finish_reason == "tool_calls"
    auto = compile_constraint(tokenizer, tools(layout, "auto"), layout)
    replies = [calls_of(tokenizer, layout, walk(tokenizer, auto, seed, marks=marks)) for seed in range(4)]
    for reply in replies:
        check_calls(reply, 0)


@pytest.mark.parametrize("name", ["dsml", "deepseek-v3.1", "kimi", "glm-4.7"])
def test_long_tokens_do_not_step_over_a_border(name):
    """The demo's vocabulary has marks in pieces, some with more in them."""
    tokenizer = load_tokenizer(DEMO)
    layout = Layout(form=case(name)[1].form, tools=OFFERED)
    constraint = compile_constraint(tokenizer, tools(layout, "required", parallel=False), layout)
    for seed in range(2):
        check_calls(calls_of(tokenizer, layout, walk(tokenizer, constraint, seed, marks=layout.form.marks)))
    value = text_of(tokenizer, walk(tokenizer, compile_constraint(tokenizer, json_schema(PARAMETERS)), 1))
    assert is_valid(json.loads(value), PARAMETERS, PARAMETERS)


@pytest.mark.parametrize("controls", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_models_write_is_let_through(name, controls):
    tokenizer, layout = case(name, controls, offered=None or [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}}}}}, OFFERED[2]])
    text = WRITTEN[name][2]
    auto = compile_constraint(tokenizer, tools(layout), layout)
    assert accepts(tokenizer, auto, text)[1] and accepts(tokenizer, auto, "No call.")[1]
    assert accepts(tokenizer, auto, text, parse_special=False)[1]       # marks that come in pieces
    assert not accepts(tokenizer, auto, text.replace("weather", "whether"))[1]
    assert not accepts(tokenizer, auto, text.replace("[1, 2]", '["1"]'))[1]
    none = compile_constraint(tokenizer, tools(layout, "none"), layout)
    assert not accepts(tokenizer, none, text)[1] and not accepts(tokenizer, none, text, False)[1]
    assert accepts(tokenizer, none, "No call.")[1]
    call = text.removeprefix("I look.").lstrip("\n")
    for choice, good in (("required", True), ({"type": "function", "function": {"name": "weather"}}, True), ({"name": "now"}, False)):
        constraint = compile_constraint(tokenizer, tools(layout, choice), layout)
        assert not accepts(tokenizer, constraint, "No call.")[1] and not accepts(tokenizer, constraint, "")[1]
        assert bool(accepts(tokenizer, constraint, call)[1]) == (choice == "required")      # the second call is of another function
        assert bool(accepts(tokenizer, constraint, call[:call.index("eather")])[0] == len(
            tokenizer.encode(call[:call.index("eather")], parse_special=True))) == good
    one = compile_constraint(tokenizer, tools(layout, "auto", parallel=False), layout)
    assert not accepts(tokenizer, one, text)[1]


@pytest.mark.parametrize("name", ["dsml", "kimi", "glm-4.7"])
def test_calls_after_reasoning(name):
    tokenizer, layout = case(name, offered=OFFERED[2:])
    layout = layout._replace(opened=True)
    call = WRITTEN[name][2].removeprefix("I look.").lstrip("\n")
    one, other = call.index("weather"), call.rindex("now")
    call = call[:one] + call[other:]        # only the call of `now`
    for choice in "required", "auto":
        constraint = compile_constraint(tokenizer, tools(layout, choice), layout)
        assert accepts(tokenizer, constraint, "Hm.</think>" + call)[1] and accepts(tokenizer, constraint, "Hm.</think>\n" + call)[1]
        forgotten = accepts(tokenizer, constraint, "Hm." + call)        # the end of reasoning, which a block of calls is too
        assert forgotten[1] is True or not layout.form.opens
        assert accepts(tokenizer, constraint, "Hm.</think>No.")[1] == (True if choice == "auto" else None)


@pytest.mark.parametrize("name", ["dsml", "deepseek-v3.1", "kimi", "glm-4.7"])
def test_calls_beside_an_answer_by_a_schema(name):
    tokenizer, layout = case(name, offered=OFFERED[1:])
    constraint = constraint_for(tokenizer, layout, json_schema={"type": "object"}, tool_choice="auto")
    met = set()
    for seed in range(8):
        begins = set() if seed % 2 else {*layout.form.opens, *layout.form.begins}
        reply = calls_of(tokenizer, layout, walk(tokenizer, constraint, seed, marks=set(layout.form.marks) - begins))
        check_calls(reply, 0)
        met.add(bool(reply.tool_calls))
        assert reply.tool_calls and not reply.text.strip() or isinstance(json.loads(reply.text), dict)
    said = '{"a": "' + (layout.form.opens or layout.form.begins)[-1]
    none = constraint_for(tokenizer, layout, json_schema={"type": "object"}, tool_choice="none")
    for one in constraint, none:        # a reader would take it for a call
        assert accepts(tokenizer, one, said)[1] is None and accepts(tokenizer, one, said, parse_special=False)[1] is None
    assert met == {True, False} and accepts(tokenizer, none, '{"a": "<"}')[1]


@pytest.mark.parametrize("parameters, expected", [
    ("x", "the schema of the parameters of f is of type str"), ({"properties": {"a": {"not": {}}}}, "an argument has 'not'"),
    ({"properties": {"a": {"type": "object", "not": {}}}}, 'Unimplemented keys: \\["not"\\]'),
    ({"anyOf": [{}]}, "the parameters of f have 'anyOf'"), ({"type": "array"}, "the parameters of f are no object"),
    ({"properties": {"a": {"$ref": "#"}}}, "has the \\$ref '#', expected one into"), ({"properties": {"a": 5}}, "a schema is 5"),
    ({"properties": {"a<": {}}}, "f has the parameter 'a<'"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}}, "leads to itself"),
    ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "with \\^ and \\$ only around all of it"),
    ({"properties": {"a": {"type": "string", "minLength": -1}}}, "lengths -1 and None"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/b"}]}}}, "lead to themselves"),
    ({"properties": {"a": {"$ref": "#/$defs/0"}}, "$defs": {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)}
      | {"40": {}}}, "too many alternatives"), ({"properties": {"a": {"anyOf": [False]}}}, "a schema is false"),
    ({"properties": {"a": {"const": "</arg_value>"}}}, "may only be a text with </arg_value> in it")])
def test_tools_that_cannot_be_served(parameters, expected):
    """With "strict": true; of other tools calls are held to what can be held."""
    tokenizer, layout = case("glm-4.7", offered=[{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}])
    with pytest.raises(ConstraintError, match=expected):
        compile_constraint(tokenizer, tools(layout), layout)
    layout.tools[0]["function"]["strict"] = False
    with pytest.warns(UserWarning, match=f"(?i)of the tool f are held to a part of its schema only: .*{expected}"):
        compile_constraint(tokenizer, tools(layout), layout)


UNKNOWN = {"propertyNames": {"type": "string"}, "not": {"required": ["x"]}, "minProperties": 1, "if": {}, "then": {}}
LOOK_AHEAD = {"type": "string", "pattern": "^(?!x)[a-z]$"}


@pytest.mark.parametrize("parameters, arguments, wrong", [
    ({"properties": {"a": UNKNOWN | {"type": "object", "additionalProperties": {"type": "integer"}}}}, {"a": {"x": 1}}, {"a": {"x": "y"}}),
    ({"properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}, {"a": [1]}, {"a": ["x"]}),
    ({"properties": {"a": LOOK_AHEAD}, "required": ["a"]}, {"a": "b"}, {}), ({"properties": {"a": {"type": "any"}}}, {"a": [1]}, {"b": 1}),
    ({"anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {"type": "integer"}}}], "if": {}}, {"b": 1}, {"c": 1}),
    ({"allOf": [{"$ref": "#/$defs/p"}, {"if": {}, "then": {"properties": {"b": {"type": "integer"}}}}],
      "$defs": {"p": {"properties": {"a": LOOK_AHEAD}, "required": ["a"]}}}, {"a": "c", "b": 1}, {"b": 1}),
    ({"properties": None, "required": None}, {}, {"a": "b"})])
@pytest.mark.parametrize("name", ["kimi", "glm-4.7"])
@pytest.mark.filterwarnings("ignore:Calls of the tool")
def test_schemas_that_no_grammar_holds_do_not_end_a_conversation(name, parameters, arguments, wrong):
    """Clients offer all tools that they have: what can be held of a schema is, and all that it allows stays possible."""
    tokenizer, layout = case(name, offered=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    constraint = compile_constraint(tokenizer, tools(layout, "required"), layout)

    def lets_through(values):
        pairs = "".join(f"<arg_key>{key}</arg_key><arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>"
                        for key, value in values.items())
        kimi = f"functions.f:0<|tool_call_argument_begin|>{json.dumps(values)}<|tool_call_end|>"
        return accepts(tokenizer, constraint, f"<tool_call>f{pairs}</tool_call>" if name == "glm-4.7" else
                       f"<|tool_calls_section_begin|><|tool_call_begin|>{kimi}<|tool_calls_section_end|>")[1]
    assert lets_through(arguments) and (lets_through(wrong) is None or name == "kimi" and not wrong.keys() <= arguments.keys())


def test_schemas_that_take_too_long_are_taken_whole(monkeypatch):
    monkeypatch.setattr(tool_grammars, "MAX_SECONDS", -1)
    tokenizer, layout = case("kimi", offered=[{"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "null"}}}}])
    with pytest.raises(ConstraintError, match="Unimplemented keys"):
        compile_constraint(tokenizer, tools(layout), layout)


@pytest.mark.parametrize("choice, expected", [("any", "is 'any'"), ({"name": "x"}, "names 'x'"), (7, "is 7"), ({}, "is {}")])
def test_choices_that_cannot_be_served(choice, expected):
    _, layout = case("kimi")
    with pytest.raises(ConstraintError, match=f"tool_choice {re.escape(expected)}, expected 'auto', 'none'"):
        tools(layout, choice)
    assert tools(layout, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"name": "now"}]}}) == (
        tools(layout._replace(tools=[tool for tool in layout.tools if tool["function"]["name"] == "now"])))
    with pytest.raises(ConstraintError, match="2 tools are given, expected .* a name of its own"):
        tools(layout._replace(tools=OFFERED[:1] * 2))
    with pytest.raises(ConstraintError, match="a tool has the name 'a b'"):
        tools(layout._replace(tools=[{"function": {"name": "a b"}}]))
    assert tools(layout._replace(form=None)) is None
