"""The demo model as a GGUF file.

It has Q8_0 matrices, the trained vocabulary and a chat template in the format of DeepSeek V3.2.
"""
from dataclasses import replace

from tools.make_model import quantize, write_model

# The roles are those of V3.2's plain conversations. An answer of an earlier turn ends with eos.
TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}\
{% if add_generation_prompt or not loop.last %}<｜Assistant｜></think>{% endif %}\
{% elif message['role'] == 'assistant' %}{{ message['content'] }}<｜end▁of▁sentence｜>\
{% else %}{{ message['content'] }}{% endif %}{% endfor %}"""


def export(path, spec, weights, vocabulary, kind="Q8_0"):
    """Write weights {GGUF name: torch tensor} to `path`.

    Matrices are stored in the type `kind`.
    """
    def rows_of(name, shape, of_type):
        yield quantize(weights[name].detach().float().cpu().numpy().reshape(-1, shape[-1]), of_type)

    spec = replace(spec, type=kind, chat_template=TEMPLATE)
    return write_model(path, spec, "pydsa demo", (vocabulary.learned, vocabulary.merges), rows_of)
