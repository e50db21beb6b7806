"""Calls of tools in the output of each family of models.

They come in pieces of any size, and are put back into the conversation.
"""
import json

import pytest
from chat_cases import QUESTION, small
from test_chat import V32

from pydsa.chat import chat_prompt, encode_chat
from pydsa.text.answers import Layout, Reader, Splitter
from pydsa.text.tokenizer import CONTROL, USER_DEFINED
from pydsa.text.tool_calls import FORMS, find_form

CALLS = "{% if m.tool_calls %}OPEN{% for c in m.tool_calls %}EACH{% endfor %}CLOSE{% endif %}"
FRAME = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}" + CALLS + "<eos>{% else %}<bos>{{ m.content }}"
         "{% endif %}{% endfor %}")
GLM_PAIRS = ("{% for k, v in c.function.arguments.items() %}\n\n<arg_key>{{ k }}</arg_key>\n<arg_value>"
             "{{ v if v is string else v | tojson }}</arg_value>{% endfor %}")
V3 = {"<｜tool▁calls▁begin｜>": CONTROL, "<｜tool▁calls▁end｜>": CONTROL, "<｜tool▁call▁begin｜>": CONTROL, "<｜tool▁call▁end｜>": CONTROL,
      "<｜tool▁sep｜>": CONTROL}
KIMI = {"<|tool_calls_section_begin|>": CONTROL, "<|tool_calls_section_end|>": CONTROL, "<|tool_call_begin|>": CONTROL,
        "<|tool_call_end|>": CONTROL, "<|tool_call_argument_begin|>": CONTROL}
GLM = {text: USER_DEFINED for text in ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")}
ENDS = {"<bos>": CONTROL, "<eos>": CONTROL, "<think>": USER_DEFINED, "</think>": USER_DEFINED}


def framed(opens, each, closes=""):
    return FRAME.replace("OPEN", opens).replace("EACH", each).replace("CLOSE", closes)


# name -> (special tokens, template, what the model writes)
WRITTEN = {
    "dsml": (V32, None, """I look.

<｜DSML｜function_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Köln </b>
"x"</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="now">

</｜DSML｜invoke>
</｜DSML｜function_calls>"""),
    "deepseek-v3.1": (V3 | ENDS, framed("<｜tool▁calls▁begin｜>", "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + "
                                        "c.function.arguments + '<｜tool▁call▁end｜>' }}", "<｜tool▁calls▁end｜>"),
                      'I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city":"Köln </b>\\n\\"x\\"", "days": [1, 2]}'
                      "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "deepseek-r1": (V3 | ENDS, framed("<｜tool▁calls▁begin｜>", "{{ '\n' if not loop.first }}{{ '<｜tool▁call▁begin｜>' + c.type + "
                                      "'<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments + "
                                      "'\n```<｜tool▁call▁end｜>' }}", "<｜tool▁calls▁end｜>"),
                    'I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n'
                    '{"city": "Köln </b>\\n\\"x\\"", "days": [1, 2]}\n```<｜tool▁call▁end｜>\n'
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "kimi": (KIMI | ENDS, framed("<|tool_calls_section_begin|>", "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function."
                                 "arguments if c.function.arguments is string else c.function.arguments | tojson }}<|tool_call_end|>",
                                 "<|tool_calls_section_end|>"),
             'I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Köln </b>\\n'
             '\\"x\\"","days":[1, 2]}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
             "<|tool_calls_section_end|>"),
    "glm-4.5": (GLM | ENDS, framed("", "\n\n<tool_call>{{ c.function.name }}" + GLM_PAIRS + "\n\n</tool_call>"),
                'I look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln </b>\n"x"</arg_value>\n<arg_key>days</arg_key>\n'
                "<arg_value>[1, 2]</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"),
    "glm-4.7": (GLM | ENDS, framed("", "<tool_call>{{ c.function.name }}" + GLM_PAIRS.replace("\n", "") + "</tool_call>"),
                'I look.<tool_call>weather<arg_key>city</arg_key><arg_value>Köln </b>\n"x"</arg_value><arg_key>days</arg_key>'
                "<arg_value>[1, 2]</arg_value></tool_call><tool_call>now</tool_call>"),
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}}}}},
    {"type": "function", "function": {"name": "now"}}]
BEGUN = {"dsml": "I look.\n\n<｜DSML｜function_calls>\n", "deepseek-v3.1": "I look.<｜tool▁calls▁begin｜>",
         "kimi": "I look.<|tool_calls_section_begin|>", "glm-4.7": "I look."}


def read(name, text, parse_special=True, tools=TOOLS, **options):
    """The pieces and the Reply of what a model writes.

    Special tokens are tokens, or without parse_special one byte each.
    """
    special, template, _ = WRITTEN[name]
    tokenizer = small(special, [])
    prompt = chat_prompt(tokenizer, [QUESTION], tools=tools, template=template, **options)
    stream = Reader(tokenizer, None, prompt.layout).read(iter(tokenizer.encode(text, parse_special=parse_special)))
    return list(stream), stream.reply


@pytest.mark.parametrize("parse_special", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_found_byte_by_byte(name, parse_special):
    special, template, text = WRITTEN[name]
    if not parse_special:       # user-defined tokens are always parsed
        special = special | {marker: CONTROL for marker in special}
    tokenizer = small(special, [])
    layout = chat_prompt(tokenizer, [QUESTION], tools=TOOLS, template=template).layout
    ids = tokenizer.encode(text, parse_special=parse_special)
    assert parse_special or len(ids) == len(text.encode())
    stream = Reader(tokenizer, None, layout).read(iter(ids))
    pieces, reply = list(stream), stream.reply
    assert "".join(pieces) == text and reply.text == "I look." and reply.reasoning == "" and reply.finish_reason == "tool_calls"
    assert [call["function"]["name"] for call in reply.tool_calls] == ["weather", "now"]
    assert [json.loads(call["function"]["arguments"]) for call in reply.tool_calls] == [{"city": 'Köln </b>\n"x"', "days": [1, 2]}, {}]
    assert all(call["type"] == "function" and call["id"] for call in reply.tool_calls)
    assert len({call["id"] for call in reply.tool_calls}) == 2
    assert [piece.call for piece in pieces if piece.kind == "tool_call"] == reply.tool_calls
    answer = [piece for piece in pieces if piece.kind == "answer"]
    assert len(answer) >= 5 and "".join(answer) == "I look."       # as it comes, not at the end


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_put_back_is_what_the_model_wrote(name):
    special, template, text = WRITTEN[name]
    tokenizer = small(special, [], bos_token_id=None)
    results = [{"role": "tool", "content": "r"}] * 2 if template is None else []
    for thinking in (False, True) if template is None else (False,):
        begun = encode_chat(tokenizer, [QUESTION], tools=TOOLS, template=template, thinking=thinking)
        written = ("Hm.</think>" if thinking else "") + text
        _, reply = read(name, written, thinking=thinking)
        assert reply.reasoning == ("Hm." if thinking else "")
        ids = encode_chat(tokenizer, [QUESTION, reply.message, *results], tools=TOOLS, template=template, thinking=thinking,
                          add_generation_prompt=False)
        context = begun + tokenizer.encode(written, parse_special=True)
        assert ids[:len(context)] == context        # so that a session runs none of it again


@pytest.mark.parametrize("name, body", [
    ("dsml", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">{</｜DSML｜parameter>\n</｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">NaN</｜DSML｜parameter>\n</｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a">x</｜DSML｜parameter>\n</｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">1e999</｜DSML｜parameter>\n</｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f"><｜DSML｜parameter name="a" string="false">' + "[" * 99999 + '</｜DSML｜parameter></｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f">\nfree text\n</｜DSML｜invoke>'), ("dsml", "<｜DSML｜invoke>\n</｜DSML｜invoke>"),
    ("dsml", '<｜DSML｜invoke name="f">' + '<｜DSML｜parameter name="a" string="true">x</｜DSML｜parameter>' * 2 + "</｜DSML｜invoke>"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{<｜tool▁call▁end｜>"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>[1]<｜tool▁call▁end｜>"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>two words<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
    ("kimi", "<|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{'a'}<|tool_call_end|>"),
    ("glm-4.7", "<tool_call>two words</tool_call>"), ("glm-4.7", "<tool_call></tool_call>"),
    ("glm-4.7", "<tool_call>f<arg_key>a</arg_key></tool_call>"),
    ("glm-4.7", "<tool_call>f<arg_key>a</arg_key></arg_key><arg_value>1</arg_value></tool_call>"),
    ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"), ("glm-4.7", "<tool_call>f<arg_key>a"),
    ("dsml", '<｜DSML｜invoke name="f">\n'), ("deepseek-v3.1", "between the calls")])
def test_what_is_no_call_is_text(name, body):
    text = BEGUN[name] + body
    for parse_special in True, False:
        pieces, reply = read(name, text, parse_special)
        assert "".join(pieces) == text and reply.text == "I look." + body and not reply.tool_calls and reply.finish_reason == "stop"


@pytest.mark.parametrize("schema, value, expected", [
    ({"type": "string"}, "5", "5"), ({"type": "integer"}, "5", 5), ({"type": "integer"}, "5.5", "5.5"),
    ({"type": "integer"}, "true", "true"),
    ({"type": "number"}, " 5.5 ", 5.5), ({"type": "number"}, "1e999", "1e999"), ({"type": "array"}, '["\\ud800"]', ["\ud800"]),
    ({"type": "boolean"}, "true", True), ({"type": "boolean"}, "yes", "yes"),
    ({"type": "object"}, '{"a": "ö"}', {"a": "ö"}), ({"type": "array"}, "x", "x"), ({"type": ["integer", "null"]}, "null", None),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None), ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
    ({"enum": [1, 2]}, "2", 2), ({"enum": ["1", "2"]}, "2", "2"), ({"const": True}, "true", True), ({"$ref": "#/x"}, "[1]", [1]),
    ({}, "5", 5), ({}, "x", "x"), (None, "5", "5"), ("odd", "5", "5"), ({"type": "integer"}, "9" * 5000, "9" * 5000)])
def test_values_of_glm_have_the_types_of_the_schema(schema, value, expected):
    tools = [{"function": {"name": "f", "parameters": {"properties": {} if schema is None else {"a": schema}}}}]
    _, reply = read("glm-4.7", f"<tool_call>f<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>", tools=tools)
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"a": expected}


@pytest.mark.parametrize("schema, expected", [
    ({"$ref": "#/$defs/word"}, "5"), ({"anyOf": [{"$ref": "#/$defs/word"}, {"type": "null"}]}, "5"), ({"$ref": "#/$defs/number"}, 5),
    ({"$ref": "#/$defs/again"}, 5), ({"$ref": "#/$defs/a~1b"}, "5"), ({"$ref": "#/$defs/wide"}, "5")])
def test_values_of_glm_have_the_types_of_definitions(schema, expected):
    defs = {"word": {"enum": ["5", "6"]}, "number": {"type": "integer"}, "again": {"$ref": "#/$defs/again"}, "a/b": {"type": "string"},
            "wide": {"anyOf": [{"$ref": "#/$defs/wide"}] * 1000 + [{"type": "string"}]}}      # a walk of all ways would take for ever
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": schema}, "$defs": defs}}}]
    _, reply = read("glm-4.7", "<tool_call>f<arg_key>a</arg_key><arg_value>5</arg_value></tool_call>", tools=tools)
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"a": expected}


@pytest.mark.parametrize("parameters", [None, "x", [], {"properties": 7}, {}])
def test_schemas_of_any_form(parameters):
    tools = [{"function": {"name": "f", "parameters": parameters}}]
    _, reply = read("glm-4.7", "<tool_call>f<arg_key>a</arg_key><arg_value>5</arg_value></tool_call>", tools=tools)
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"a": "5"}


def test_calls_have_the_ids_that_kimi_writes():
    """Its models go on with ids that they see, and others name no function."""
    special, template, _ = WRITTEN["kimi"]
    tokenizer, ids = small(special, []), ["functions.weather:0", "call_1", "toolu_2"]
    messages = [QUESTION]
    for given, name in zip(ids, ("weather", "now", "weather")):
        messages += [{"role": "assistant", "tool_calls": [{"id": given, "function": {"name": name}}]},
                     {"role": "tool", "tool_call_id": given, "content": "r"}]
    template = template.replace("{{ m.content }}{% endif %}", "{{ m.tool_call_id or '' }},{% endif %}")
    text = tokenizer.decode(encode_chat(tokenizer, messages, template=template))
    for own in "functions.weather:0", "functions.now:1", "functions.weather:2":
        assert text.count(f"{own}<|tool_call_argument_begin|>") == text.count(f"{own},") == 1
    assert "call_1" in tokenizer.decode(encode_chat(tokenizer, messages, template="{{ messages[3].tool_calls[0].id }}"))


def test_text_after_the_calls_is_answer():
    _, reply = read("glm-4.7", WRITTEN["glm-4.7"][2] + "Done.")
    assert reply.text == "I look.Done." and len(reply.tool_calls) == 2


def test_calls_are_not_looked_for_without_tools_nor_in_reasoning():
    text = "<think>" + WRITTEN["glm-4.7"][2] + "</think>2"
    _, reply = read("glm-4.7", text)
    assert not reply.tool_calls and "<tool_call>" in reply.reasoning and reply.text == "2"
    _, reply = read("glm-4.7", WRITTEN["glm-4.7"][2], tools=None)
    assert not reply.tool_calls and reply.text == WRITTEN["glm-4.7"][2]


@pytest.mark.parametrize("name", ["dsml", "deepseek-v3.1", "kimi"])
def test_a_block_of_calls_ends_reasoning(name):
    text = WRITTEN[name][2]
    pieces, reply = read(name, "<think>" + text)
    assert (reply.reasoning, reply.text, len(reply.tool_calls)) == ("I look.", "", 2) and "".join(pieces) == "<think>" + text


def test_prose_with_the_mark_of_a_call_is_not_held_back():
    special, template, call = WRITTEN["glm-4.7"]
    splitter = Splitter(Layout(form=find_form(template, ()), tools=TOOLS))
    assert "".join(splitter.push("Write <tool_call> and a name, ")) == "Write <tool_call> and a name, "
    assert [piece.kind for piece in splitter.push(call)] == ["answer", "tool_call", "tool_call"]
    text = "<tool_call>one two " + call
    pieces = [piece for character in text for piece in splitter.push(character)]
    assert "".join(pieces) == text and sum(piece.kind == "tool_call" for piece in pieces) == 2


# Calls that are given as they are written

MORE = {     # name -> more that a model may write: an id, a value of another type, no value, an odd end
    "dsml": WRITTEN["dsml"][2].replace('"days" string="false">[1, 2]', '"days" string="false"> {"a" : 1.50, "b":"\\ud800"}'),
    "deepseek-v3.1": WRITTEN["deepseek-v3.1"][2].replace("{}", "\n { } "), "kimi": WRITTEN["kimi"][2].replace("{}", " {\n} \n"),
    "glm-4.7": WRITTEN["glm-4.7"][2].replace("[1, 2]", "one").replace('"x"', "</arg_valu </tool_cal\\ \u2028\x00")}
STREAMED = [(name, text) for name, (_, _, text) in WRITTEN.items()] + list(MORE.items())


def streamed(name, text, cuts=None):
    """The pieces of a text whose calls are streamed; cuts: where it is cut, None: everywhere."""
    special, template, _ = WRITTEN[name]
    splitter = Splitter(Layout(form=find_form(template, special), tools=TOOLS, streams_calls=True))
    edges = [0, *sorted(range(1, len(text)) if cuts is None else cuts), len(text)]
    pieces = [piece for start, end in zip(edges, edges[1:]) for piece in splitter.push(text[start:end])] + splitter.flush()
    assert "".join(pieces) == text
    return pieces


def calls_of(pieces):
    """(name, arguments) of the streamed calls, each also complete in the end."""
    calls = {}
    for piece in pieces:
        if piece.kind == "call_delta":
            calls.setdefault(piece.call["id"], []).append(piece.call["function"])
    whole = [piece.call for piece in pieces if piece.kind == "tool_call"]
    assert [call["id"] for call in whole] == list(calls)
    for call in whole:
        assert {part["name"] for part in calls[call["id"]]} == {call["function"]["name"]}
        assert "".join(part["arguments"] for part in calls[call["id"]]) == call["function"]["arguments"]
    return [(call["function"]["name"], call["function"]["arguments"]) for call in whole]


@pytest.mark.parametrize("name, text", STREAMED)
def test_streamed_calls_are_those_that_are_read_whole(name, text):
    special, template, _ = WRITTEN[name]
    splitter = Splitter(Layout(form=find_form(template, special), tools=TOOLS))
    whole = [piece.call["function"] for piece in splitter.push(text) + splitter.flush() if piece.kind == "tool_call"]
    assert len(whole) == 2
    for cuts in None, (), range(1, len(text), 7):
        pieces = streamed(name, text, cuts)
        assert calls_of(pieces) == [(call["name"], call["arguments"]) for call in whole]
        assert "".join(piece for piece in pieces if piece.kind == "answer") == "I look."


@pytest.mark.parametrize("name, text", STREAMED)
def test_a_streamed_call_that_is_cut_off_is_a_beginning(name, text):
    complete = calls_of(streamed(name, text))
    for n in range(len(text)):
        calls = calls_of(streamed(name, text[:n]))
        assert all(call == expected for call, expected in zip(calls[:-1], complete))
        if calls:
            assert calls[-1][0] == complete[len(calls) - 1][0] and complete[len(calls) - 1][1].startswith(calls[-1][1])


@pytest.mark.parametrize("name", ["dsml", "deepseek-v3.1", "kimi", "glm-4.7"])
def test_a_text_in_a_call_is_given_as_it_is_written(name):
    """Agents write whole files so."""
    value = "line of a file " * 50
    text = WRITTEN[name][2].replace('Köln </b>\\n\\"x\\"', value).replace('Köln </b>\n"x"', value)
    parts = [piece.call["function"]["arguments"] for piece in streamed(name, text) if piece.kind == "call_delta"]
    assert sum(len(part) for part in parts) > len(value) and max(map(len, parts)) < 20


@pytest.mark.parametrize("name, body", [
    ("dsml", '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">{</｜DSML｜parameter>\n</｜DSML｜invoke>'),
    ("dsml", '<｜DSML｜invoke name="f">\nfree text\n</｜DSML｜invoke>'),
    ("kimi", "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>["), ("glm-4.7", "<tool_call>f<arg_key>a</arg_key></tool_call>")])
def test_a_streamed_call_that_no_constraint_kept_is_given_as_far_as_it_was_read(name, body):
    pieces = streamed(name, BEGUN[name] + body)
    (call,) = calls_of(pieces)
    assert call[0] == "f" and len(call[1]) < 8


def test_what_is_no_call_is_text_where_calls_are_streamed():
    for name, body in (("dsml", "<｜DSML｜invoke>\n</｜DSML｜invoke>"), ("glm-4.7", "<tool_call>two words<arg_key></tool_call>"),
                       ("kimi", "<|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|>"),
                       ("deepseek-v3.1", "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>")):
        pieces = streamed(name, BEGUN[name] + body)
        assert not calls_of(pieces) and {piece.kind for piece in pieces} <= {"answer", "markup"}


def test_only_the_first_call_where_no_more_may_come():
    special, template, text = WRITTEN["kimi"]
    tokenizer = small(special, [])
    for streams in False, True:
        layout = chat_prompt(tokenizer, [QUESTION], tools=TOOLS, template=template).layout._replace(single_call=True, streams_calls=streams)
        ids = tokenizer.encode(text, parse_special=True)
        stream = Reader(tokenizer, None, layout).read(iter(ids))
        pieces, reply = list(stream), stream.reply
        assert len(reply.tool_calls) == 1 and reply.finish_reason == "tool_calls" and reply.n_generated < len(ids)
        assert "".join(pieces) == text[:text.index("<|tool_call_end|>") + len("<|tool_call_end|>")]


def test_the_form_is_that_of_the_template_else_of_the_vocabulary():
    marks = [form.mark for form in FORMS]
    assert [find_form(f"x{mark}x", ()).mark for mark in marks] == marks
    assert find_form("<arg_key>", ("｜DSML｜",)).mark == "<arg_key>"
    assert find_form("no calls", ("<|tool_calls_section_begin|>",)).mark == "<|tool_calls_section_begin|>"
    assert find_form(None, ("<｜tool▁calls▁begin｜>", "｜DSML｜")).mark == "｜DSML｜"
    assert find_form("<tool_call>", ("<tool_call>",)) is None and Layout().form is None


def test_a_block_of_v4_is_read_too():
    text = WRITTEN["dsml"][2].replace("function_calls", "tool_calls")
    _, reply = read("dsml", text)
    assert reply.text == "I look." and len(reply.tool_calls) == 2
