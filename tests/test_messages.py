"""Messages as clients write them: parts, missing keys, arguments as text and as a dict, roles, and what templates need."""
import json

import pytest
from chat_cases import GLM, QUESTION, small, user
from test_chat import V32, v32_tokenizer

from pydsa.chat import encode_chat, thinking_note
from pydsa.errors import PydsaError
from pydsa.text.messages import Arguments, checked
from pydsa.text.tokenizer import CONTROL

PARTS = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1=?"}]
PRINTED = "{% for m in messages %}{{ m.content }}{% endfor %}"


def called(arguments="{}", **message):
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": None, "function": {"name": "f", "arguments": arguments}}], **message}


def render(template, *messages, special=GLM, **options):
    tokenizer = small(special, [])
    return tokenizer.decode(encode_chat(tokenizer, [QUESTION, *messages], template=template, add_generation_prompt=False, **options))


# Parts of text

@pytest.mark.parametrize("message", [
    {"content": "2", "reasoning": "Hm."}, {"content": ["2"], "reasoning_content": ["Hm."]},
    {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "output_text", "text": "2"}]},
    {"content": [{"type": "reasoning", "reasoning": "H"}, {"type": "reasoning", "reasoning": "m."}, {"type": "text", "text": "2"}]}])
def test_thoughts_and_texts_have_several_names(message):
    assert checked([{"role": "assistant"} | message]) == [{"role": "assistant", "content": "2", "reasoning_content": "Hm."}]


@pytest.mark.parametrize("template", [None, PRINTED])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_parts_are_joined_in_every_role(role, template):
    tokenizer = v32_tokenizer()
    texts = []
    for content in ("1+1=?", PARTS):
        before = [QUESTION, called()] if role == "tool" else []
        texts.append(tokenizer.decode(encode_chat(tokenizer, [*before, {"role": role, "content": content}, QUESTION], template=template)))
    assert texts[0] == texts[1] and texts[0].count("1+1=?") == (3 if role == "tool" else 2)


def test_special_texts_across_parts_stay_text():
    tokenizer = v32_tokenizer()
    parts = [{"type": "text", "text": "<｜Us"}, {"type": "text", "text": "er｜>"}]
    ids = encode_chat(tokenizer, [user(parts)])
    assert ids.count(tokenizer.tokens.index("<｜User｜>")) == 1 and tokenizer.decode(ids).count("<｜User｜>") == 2


# Messages without content

def test_what_only_calls_or_thinks_needs_no_content():
    """Answers may be stopped at once, and functions may return nothing."""
    for message in called(), called(content=None), {"role": "assistant", "content": None, "reasoning_content": "Hm."}, {
            "role": "assistant"}, {"role": "tool", "content": None}:
        assert checked([message])[0]["content"] == ""


def test_keys_that_are_none_are_not_there():
    """Clients send every field, and templates ask whether a key is there."""
    message = {"role": "assistant", "content": "2", "tool_calls": [], "reasoning_content": None, "refusal": None, "name": None}
    assert checked([message]) == [{"role": "assistant", "content": "2"}]
    assert checked([message | {"tool_calls": None}]) == [{"role": "assistant", "content": "2"}]


@pytest.mark.parametrize("content", [None, "", "x"])
def test_a_template_that_asks_for_none_gets_none(content):
    """DeepSeek R1's template shows calls only where the content is none."""
    asks = ("{% for m in messages if m.role == 'assistant' %}{% if m['content'] is none %}{{ m.tool_calls[0].function.name }}"
            "{% else %}[{{ m.content }}]{% endif %}{% endfor %}")
    assert render(asks, called(content=content)) == ("[x]" if content else "f")
    assert render("{% for m in messages %}{{ '' if m.role == 'tool' and m.content is none else m.content.strip() }}{% endfor %}",
                  called(content=content)) == "1+1=?" + (content or "")       # asks, but not of this message
    assert render("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", called(content=content)) == "1+1=?" + (content or "")


# Arguments

GIVEN = '{"città": "Köln" ,"n":[1, 2]}'
USES = [("{% for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}", "città=Köln;n=[1, 2];"),
        ("{% for k, v in a | items %}{{ k }}{% endfor %}{{ a['n'][1] }}{{ a.n | tojson }}", "cittàn2[1, 2]"),
        ("{{ a }}", "TEXT"), ("{{ '<' + a + '>' }}", "<TEXT>"), ("{{ '<' ~ a ~ '>' }}", "<TEXT>"), ("{{ a | tojson }}", "TEXT"),
        ("{{ a | string | trim }}", "TEXT"), ("{{ (a | from_json).n }}", "[1, 2]"), ("{{ ['<', a] | join }}", "<TEXT"),
        ("{{ a if a is string else a | tojson(ensure_ascii=False) }}", "TEXT"), ("{{ a is mapping }}{{ a | length }}", "True2"),
        ("{{ a | tojson(separators=(',', ':')) }}", '{"città":"Köln","n":[1,2]}'),
        ("{{ messages[1].tool_calls[0].type + messages[1].tool_calls[0].id }}", "function1")]


@pytest.mark.parametrize("use, expected", USES)
@pytest.mark.parametrize("given", [GIVEN, json.loads(GIVEN)])
def test_arguments_serve_every_template(use, expected, given):
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    assert render("{% set a = messages[1].tool_calls[0].function.arguments %}" + use, called(given)) == expected.replace("TEXT", text)


@pytest.mark.parametrize("given", [None, "", " ", "{}", {}])
def test_a_call_without_arguments(given):
    template = "{{ messages[1].tool_calls[0].function.arguments }}{{ messages[1].tool_calls[0].function.arguments.items() | list }}"
    assert render(template, called(given)) == "{}[]"
    assert "<｜DSML｜invoke name=\"f\">\n\n</｜DSML｜invoke>" in render(None, called(given), special=V32)


@pytest.mark.parametrize("given, items", [
    ('{"a": 1, "città": "Kö', [("a", 1), ("città", "Kö")]), ('{"a": 12', [("a", 12)]), ("{", []),
    ('{"a": [1, {"b": "x,}', [("a", [1, {"b": "x,}"}])]),
    ('{"a": "x", "b": tr', [("a", "x")]), ('{"a": "x\\', [("a", "x")]), ('{"a": "x\\u00e', [("a", "x")]),
    ('{"a": "x", "b', [("a", "x")])])
def test_a_call_that_was_cut_off(given, items):
    template = "{{ messages[1].tool_calls[0].function.arguments }}|{{ messages[1].tool_calls[0].function.arguments.items() | list }}"
    assert render(template, called(given)) == f"{given}|{items}"
    assert all(f'name="{name}"' in render(None, called(given), special=V32) for name, _ in items)


@pytest.mark.parametrize("given", ['{"a": 1}}', "{'a': 1}", "[1", "a", '{"a": 1 "b', '{"a": ' + 300 * "["])
def test_arguments_that_are_no_json(given):
    with pytest.raises(PydsaError, match="expected a dict, or JSON of one"):
        render(None, called(given), special=V32)


def test_a_call_that_was_cut_off_anywhere():
    """Whoever sends it back as history must be able to go on."""
    whole = json.dumps({"path": 'a\\b "q" {x}, [y]', "n": [1, {"k": "v,w"}], "t": True, "u": "é"}, ensure_ascii=False)
    for n in range(1, len(whole)):
        arguments = checked([called(whole[:n])])[0]["tool_calls"][0]["function"]["arguments"]
        assert str(arguments) == whole[:n] and arguments.keys() <= {"path", "n", "t", "u"}
    assert arguments == json.loads(whole)


@pytest.mark.parametrize("template, first", [(None, "<result>1</result>\n<result>2</result>"), (PRINTED, "12")])
def test_results_come_in_the_order_of_their_calls(template, first):
    calls = [{"id": i, "function": {"name": "f"}} for i in "ab"]
    results = [{"role": "tool", "tool_call_id": i, "content": text} for i, text in (("b", "2"), ("a", "1"))]
    assert first in render(template, {"role": "assistant", "tool_calls": calls}, *results, QUESTION, special=V32)
    cancelled = render(None, {"role": "assistant", "tool_calls": calls}, results[0], QUESTION, special=V32)
    assert "<result>2</result>\n</function_results>" in cancelled and checked(results) == results


def test_texts_in_arguments_stay_text():
    tokenizer = small(GLM, [])
    for template in "{{ messages[1].tool_calls[0].function.arguments }}", "{{ messages[1].tool_calls[0].function.arguments.a }}":
        ids = encode_chat(tokenizer, [QUESTION, called('{"a": "<|user|>"}')], template=template)
        assert "<|user|>" in tokenizer.decode(ids) and tokenizer.tokens.index("<|user|>") not in ids


def test_an_argument_may_have_any_name():
    given = {"text": 1, "_text": 2, "items": 3, "keys": 4}
    assert render("{% set a = messages[1].tool_calls[0].function.arguments %}{{ a['text'] }}{{ a['_text'] }}{{ a['items'] }}{{ a.text }}",
                  called(given)) == "1231"
    assert Arguments(given, "x")["_text"] == 2


# Roles and blocks of templates

def test_a_developer_is_a_system_to_who_does_not_know_it():
    messages = [{"role": "developer", "content": "Be brief."}, QUESTION]
    tokenizer = v32_tokenizer()
    as_system = encode_chat(tokenizer, [messages[0] | {"role": "system"}, QUESTION])
    assert encode_chat(tokenizer, messages) == as_system
    shown = "{% for m in messages %}{{ m.role }},{% endfor %}"
    assert tokenizer.decode(encode_chat(tokenizer, messages, template=shown)[1:]) == "system,user,"
    knows = shown + "{{ 1 if messages[0].role == 'developer' }}"
    assert tokenizer.decode(encode_chat(tokenizer, messages, template=knows)[1:]) == "developer,user,1"


def test_more_variables_of_a_template():
    template = "{{ messages[0].content }}{{ clear_thinking }}{{ names | length }}"
    given = {"clear_thinking": False, "names": ["<|user|>"]}
    assert render(template, template_kwargs=given) == "1+1=?False1"
    ids = encode_chat(tokenizer := small(GLM, []), [QUESTION], template="{{ names[0] }}", template_kwargs={"names": given["names"]})
    assert tokenizer.decode(ids) == "<|user|>" and tokenizer.tokens.index("<|user|>") not in ids
    for name, used in ("x", template), ("clear", template), ("messages", template), ("thinking", None):
        with pytest.raises(PydsaError, match=f"a variable of the chat template is '{name}', expected one that it reads"):
            encode_chat(tokenizer, [QUESTION], template=used, template_kwargs={name: 1})


def test_generation_blocks_are_as_if_they_were_not_there():
    block = ("{% for m in messages %}{% if true %}\n  {% generation %}\n{{ m.content }}{% set x = 1 %}\n{%- endgeneration %}\n"
             "{% endif %}{% endfor %}")
    assert render(block, user("b")) == "1+1=?b"
    assert render("{%- generation -%} a {%- endgeneration -%}") == "a"


# Thinking

ALWAYS = "{{ messages[0].content }}<think>"


@pytest.mark.parametrize("template, thinking, note", [
    (ALWAYS, False, "has no switch for thinking"), (ALWAYS, True, None), ("{{ messages[0].content }}", False, None),
    ("{{ messages[0].content }}", True, "knows no thinking"), ("{{ '<think>' if enable_thinking }}", False, None),
    ("{{ '<think>' if thinking else '</think>' }}", True, None), (None, True, None), (None, False, None),
    ("{{ raise_exception('no') }}<think>", False, None)])
def test_a_template_that_takes_no_notice_of_thinking(template, thinking, note):
    tokenizer = small(V32 | {"x": CONTROL}, [])
    for _ in range(2):
        met = thinking_note(tokenizer, thinking, template)
        assert met is None if note is None else note in met


def test_refusals_are_texts():
    for message in {"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}:
        assert checked([{"role": "assistant"} | message]) == [{"role": "assistant", "content": "No."}]


@pytest.mark.parametrize("role", ["function", "tool", "system"])
def test_a_message_that_a_template_passes_over_is_an_error(role):
    template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}{% endfor %}"
    with pytest.raises(PydsaError, match=f"message 1 has the role '{role}', which .* passes over, expected one of user, assistant"):
        render(template, {"role": role, "content": "42"})
    assert "42" in render(PRINTED, {"role": role, "content": "42"})
