"""Small vocabularies, a chat template and messages for tests."""
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from pydsa.gguf.file import Metadata
from pydsa.text.tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Tokenizer

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
SPECIAL = {"<bos>": CONTROL, "<eos>": CONTROL, "<a>": CONTROL, "<a><b>": CONTROL, "ctl": CONTROL, "<unk>": UNKNOWN,
           "<think>": USER_DEFINED, "ö": USER_DEFINED, "xyz": USER_DEFINED, "yzzz": USER_DEFINED}
GLM = {"[gMASK]": CONTROL, "<sop>": CONTROL, "<|endoftext|>": CONTROL, "<|system|>": CONTROL, "<|user|>": CONTROL,
       "<|assistant|>": CONTROL, "<|observation|>": CONTROL, "<think>": USER_DEFINED, "</think>": USER_DEFINED,
       "<tool_call>": USER_DEFINED, "</tool_call>": USER_DEFINED}
GLM_TEMPLATE = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}
    {%- set ns.last = messages.index(m) -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>
{{ m.content }}
{%- elif m.role == 'system' -%}<|system|>
{{ m.content }}
{%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif %}

<tool_response>{{ m.content }}</tool_response>
{%- elif m.role == 'assistant' -%}<|assistant|>
    {%- set answer = m.content.split('</think>')[-1] -%}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}

{{ '<think>' ~ thought.strip() ~ '</think>' if loop.index0 > ns.last and thought else '</think>' }}
{{- answer.strip() }}
    {%- for call in m.tool_calls or [] -%}
        {%- set call = call.function %}
<tool_call>{{ call.name }}
        {%- for key, value in call.arguments.items() %}
 {{ key }}={{ value if value is string else value | tojson }}
        {%- endfor -%}
</tool_call>
    {%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '' if enable_thinking else '</think>' }}
{%- endif -%}"""
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "1+1=?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "città": {}}}}


def small_metadata(special=None, merges=MERGES, **keys):
    """Metadata of a vocabulary of all bytes, some merges, special tokens.

    special: text -> type. `keys` are further keys of tokenizer.ggml; None leaves a key out.
    """
    special = SPECIAL if special is None else special
    tokens = [token for token in sorted(ByteLevel.alphabet()) if token not in special]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [NORMAL] * len(tokens) + list(special.values())
    tokens += special
    ids = {f"{name}_token_id": tokens.index(f"<{name}>") for name in ("bos", "eos") if f"<{name}>" in special}
    values = {"model": "gpt2", "pre": "deepseek-v3", "tokens": tokens, "merges": list(merges),
              "token_type": np.array(types, np.int32), **ids, **keys}
    pairs = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return Metadata(pairs, path="small.gguf")


def small(special=None, merges=MERGES, **keys):
    """The tokenizer of small_metadata."""
    return Tokenizer.from_metadata(small_metadata(special, merges, **keys))


def user(content):
    return {"role": "user", "content": content}
