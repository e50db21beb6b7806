"""Chat templates in their sandbox: what they may use, what ends them.

A broken or hostile template is stopped with an error.
"""
import sys

import pytest
from chat_cases import GLM, GLM_TEMPLATE, QUESTION, SYSTEM, TOOL, small, user

from pydsa.chat import encode_chat
from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.text import template as templates
from pydsa.text.template import MAX_TEMPLATE, MAX_TEXT
from pydsa.text.tokenizer import CONTROL


def render(template, messages=(QUESTION,), tokenizer=None, **options):
    """The text of the prompt that a template makes, without BOS."""
    tokenizer = tokenizer or small(GLM, [], eos_token_id=256 + 2)
    return tokenizer.decode(encode_chat(tokenizer, list(messages), template=template, **options))


@pytest.mark.parametrize("messages, options, expected", [
    ([QUESTION], {}, "<|user|>\n1+1=?<|assistant|></think>"),
    ([QUESTION], {"thinking": True}, "<|user|>\n1+1=?<|assistant|>"),
    ([QUESTION], {"add_generation_prompt": False}, "<|user|>\n1+1=?"),
    ([SYSTEM, QUESTION, {"role": "assistant", "content": "<think>Hm.</think>2"}, user("Sure?")], {"thinking": True},
     "<|system|>\nBe brief.<|user|>\n1+1=?<|assistant|>\n</think>2<|user|>\nSure?<|assistant|>"),
    ([QUESTION, {"role": "assistant", "content": "<think>Hm.</think>2"}], {"add_generation_prompt": False},
     "<|user|>\n1+1=?<|assistant|>\n<think>Hm.</think>2"),
    ([QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "b", "c": ["ä"]}}}]},
      {"role": "tool", "content": "r"}, {"role": "tool", "content": "s"}], {"tools": [TOOL]},
     '<|system|>\n# Tools\n{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", '
     '"città": {}}}}\n<|user|>\n1+1=?<|assistant|>\n</think><tool_call>f a=b c=["ä"]</tool_call>'
     "<|observation|>\n<tool_response>r</tool_response>\n<tool_response>s</tool_response><|assistant|></think>")])
def test_a_template_like_that_of_glm(messages, options, expected):
    tokenizer = small(GLM, [])
    tokenizer.chat_template = GLM_TEMPLATE
    ids = encode_chat(tokenizer, messages, **options)
    assert ids == tokenizer.encode("[gMASK]<sop>" + expected, parse_special=True)


def test_roles_stay_comparable():
    assert render("{{ messages[0].role == 'user' }}", tokenizer=small({"user": CONTROL}, [])) == "True"


def test_a_given_template_comes_first():
    tokenizer = small(GLM, [])
    tokenizer.chat_template = GLM_TEMPLATE
    assert render("{{ messages[0].content }}!", tokenizer=tokenizer) == "1+1=?!"


@pytest.mark.parametrize("template, expected", [
    ("{{ eos_token }}|{{ bos_token }}|{{ nothing }}", "<|endoftext|>||"),
    ("{{ tools is none }}{{ thinking }}{{ enable_thinking }}", "TrueFalseFalse"),
    ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
    ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
    ("{{ {'a': 'é<'} | tojson }}{{ [1] | tojson(indent=1) }}", '{"a": "é<"}[\n 1\n]'),
    ("{{ ('[1, 2]' | from_json)[1] }}", "2"),
    ("{{ 'a' ~ 1 ~ none ~ nothing }}", "a1None"),
    ("{{ ', '.join(['a', 'b']) }}{{ ['a', 1] | join('+') }}{{ messages | join(attribute='role') }}", "a, ba+1user"),
    ("{{ 'abab'.replace('a', 'x', 1) }}{{ 'abab' | replace('b', '') }}{{ 5 | replace(5, 6) }}", "xbabaa6"),
    ("{{ 7 % 4 }}{{ 'ab' * 2 }}{{ [1] * 2 }}{{ 'a' + 'b' }}{{ 2 * 3 }}", "3abab[1, 1]ab6"),
    ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set y %}{{ f(1) }}{% endset %}{{ y ~ y }}", "<1><1>"),
    ("\ufeff{{ strftime_now('%Y') | int > 2020 }}", "True"),
    ("{{ ' Ab\n'.strip().lower().startswith('a') }}{{ 'a-b'.split('-')[1].upper() }}{{ {'a': 1}.items() | first }}",
     "TrueB('a', 1)"),
    ("{% set ns = namespace(l=[]) %}{% for i in range(3) %}{% set _ = ns.l.append({'i': i}) %}{% endfor %}{{ ns.l.pop(0) }}{{ ns.l }}",
     "{'i': 0}[{'i': 1}, {'i': 2}]"),
    ("{% set a = [] %}{% set b = [a, {'a': a}] %}{% set _ = a.append(1) %}{% set _ = a.append(a) %}{{ a }}{{ b }}",
     "[1, [1]][[], {'a': []}]")])
def test_what_templates_may_use(template, expected):
    assert render(template) == expected


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}",
    "{{ [1].insert(0, 1) }}", "{{ (messages | list).append(1) }}",
    "{{ messages[0].update(role='x') }}", "{{ '' | attr('__class__') }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}", "{{ '%s' % messages }}", "{{ (raise_exception | string).x.y }}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{{ raise_exception.__globals__['sys'] }}", "{{ lipsum() }}",
    "{{ ''['join'](['a']) }}", "{{ nothing.x }}", "{{ 1 / 0 }}", "{% if %}", "{{ nothing() }}", "{{ [1].x.y }}",
    "{{ {} | tojson(indent='x') }}", "{{ raise_exception | tojson }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{{ '{' | from_json }}", "x" * (MAX_TEMPLATE + 1), 7])
def test_templates_that_fail(template):
    with pytest.raises(UnsupportedModelError, match="small.gguf: the chat template (fails with|is)") as error:
        render(template)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ self._TemplateReference__context }}",
                                      "{{ messages | map(attribute='__class__') | join }}"])
def test_private_attributes_are_not_there(template):
    assert render(template).replace("Undefined", "") == ""


@pytest.mark.parametrize("step", [
    "ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 9", "9 * ns.x", "[ns.x, ns.x] | join", "ns.x.join(['', ns.x, ''])",
    "ns.x.replace('a', 'aaa')", "ns.x | replace('a', 'aaa')", "ns.x | tojson | tojson", "f(ns.x)", "(ns.x | list) * 9",
    "f2(ns.x)"])
def test_text_does_not_grow_without_bound(step, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 60)       # the size is to end it, on a busy machine too
    template = ("{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
                "{% macro f2(x) %}{% set l = [x] %}{% set _ = l.append(l) %}{{ l }}{% endmacro %}{% set ns = namespace(x='a\"%') %}"
                "{% for i in range(99) %}{% set ns.x = " + step + " %}{% endfor %}{{ ns.x | length }}")
    with pytest.raises(UnsupportedModelError, match=f"is stopped, as it makes more than {MAX_TEXT} characters"):
        render(template)


DOUBLED = "{% set ns = namespace(x=1, y=1) %}{% for i in range(60) %}{% set ns.x = MADE %}{% endfor %}"


@pytest.mark.parametrize("made", ["[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}", "dict(a=ns.x, b=ns.x)"])
@pytest.mark.parametrize("use", ["{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x == ns.x }}"])
def test_lists_of_lists_do_not_double_without_bound(made, use):
    with pytest.raises(UnsupportedModelError, match="is stopped, as it makes more than"):
        render(DOUBLED.replace("MADE", made) + use)


@pytest.mark.parametrize("template", [
    "{% set a = namespace() %}{% set b = namespace(x=a) %}", "{% set a = namespace() %}{% set a.x = a %}",
    "{% set a = namespace() %}{% set b = [a, a] %}", "{% set a = namespace() %}{% set b = dict(x=a) %}"])
def test_namespaces_do_not_nest(template):
    with pytest.raises(UnsupportedModelError, match="is stopped, as it puts a namespace into"):
        render(template)


@pytest.mark.parametrize("template", [
    "{{ 'a' * 1000000000000 }}", "{{ ['a'] * 1000000000000 }}", "{{ 10 ** 10 }}",
    "{{ 'a' * 5000000 }}{{ 'a' * 5000000 }}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ [[1]] | tojson(indent=1000000000) }}", "{% set x %}{{ 'a' * 5000000 }}{{ 'a' * 5000000 }}{% endset %}"])
def test_single_steps_that_are_too_large(template):
    with pytest.raises(UnsupportedModelError, match="is stopped, as it (makes|indents|computes)"):
        render(template)


@pytest.mark.parametrize("template", [
    "{{ 'a'.center(9999999999) }}", "{{ 'a' | center(9999999999) }}", "{{ '%9999999999d' % 1 }}",
    "{{ 'a'.zfill(9999999999) }}", "{{ (1).to_bytes(9999999999, 'big') }}", "{{ 'a'.encode().ljust(9999999999) }}",
    "{{ 'a'.translate({97: 'bb'}) }}",
    "{{ '{:9999999999}'.format(1) }}", "{{ 'a' | indent(9999999999, true) }}", "{{ '\t'.expandtabs(9999999999) }}"])
def test_padding_is_not_there(template):
    with pytest.raises(UnsupportedModelError, match="is unsafe|No filter named|formats a text with %"):
        render(template)


@pytest.mark.parametrize("template", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | select('in', []) | list }}{% endfor %}",
    "{% macro f(n) %}{% for i in range(n) %}{{ f(n - 1) }}{% endfor %}{% endmacro %}{{ f(30) }}"])
def test_endless_templates_are_ended(template, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    with pytest.raises(UnsupportedModelError, match="is stopped, as it takes more than 0.2 seconds"):
        render(template)


def test_a_debugger_is_left_as_it_was():
    before = sys.gettrace()

    def trace(frame, event, argument):
        return None

    sys.settrace(trace)
    try:
        render("{{ 1 }}")
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is trace


def test_a_template_may_refuse():
    with pytest.raises(PydsaError, match="the chat template refuses these messages: no system text") as error:
        render("{% if messages[0].role == 'system' %}{{ raise_exception('no system\n\ntext') }}{% endif %}", [SYSTEM])
    assert type(error.value) is PydsaError
