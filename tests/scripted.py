"""Models that write what a test says, in formats of published models.

    model = scripted("kimi", path)
    model.writes = "Hello"              # or a function of the prompt's text

An Engine or a server runs it as any other model: only its logits are made up. Nothing is computed, and nothing compiled.
"""
import time
import types

import numpy as np
from chat_cases import small
from test_tool_calls import ENDS, GLM, GLM_PAIRS, KIMI, V3, V32, WRITTEN

import pydsa
from pydsa.executor.plan import Done
from pydsa.session import Session
from pydsa.text.tokenizer import CONTROL

_THINK = "{{ '<think>' if thinking else '<think></think>' }}"
_REASONING = "{% if m.reasoning_content and not loop.last %}<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}"

KIMI_TEMPLATE = """{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}{% for m in messages -%}
{% if m.role == 'tool' %}<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id }}
{{ m.content }}{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{% if m.role == 'assistant' %}""" + _REASONING + """{% endif -%}
{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id -}}
<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}{% endif -%}
<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>""" + _THINK + "{% endif %}"

GLM_TEMPLATE = """[gMASK]<sop>{% if tools %}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for m in messages -%}
{% if m.role == 'tool' %}<|observation|><tool_response>{{ m.content }}</tool_response>
{%- elif m.role == 'assistant' %}<|assistant|>""" + _REASONING + """{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}""" + GLM_PAIRS.replace("\n", "") + """</tool_call>{% endfor %}
{%- else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor -%}
{% if add_generation_prompt %}<|assistant|>""" + _THINK + "{% endif %}"

V31_TEMPLATE = """{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.previtem.role != 'tool' -%}
<｜Assistant｜></think>{% endif %}{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls -%}
<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor -%}
<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>
{%- elif m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- else %}{{ m.content }}{% endif %}{% endfor -%}
{% if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"""

_KIMI = {f"<|im_{name}|>": CONTROL for name in ("system", "user", "assistant", "middle", "end")}
_GLM = {text: CONTROL for text in ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")}
# name -> (special tokens, the template, the text of the token that ends a turn, an answer with two calls)
FORMATS = {
    "dsml": (V32, None, "<｜end▁of▁sentence｜>", WRITTEN["dsml"][2]),
    "deepseek-v3.1": (V3 | V32, V31_TEMPLATE, "<｜end▁of▁sentence｜>", WRITTEN["deepseek-v3.1"][2]),
    "kimi": (KIMI | ENDS | _KIMI, KIMI_TEMPLATE, "<|im_end|>", WRITTEN["kimi"][2]),
    "glm-4.7": (GLM | ENDS | _GLM, GLM_TEMPLATE, "<|user|>", WRITTEN["glm-4.7"][2])}


class ScriptedSession(Session):
    """A session whose logits are those of the next token of the answer.

    An answer begins after tokens that do not come one by one. A token that a constraint puts in place of one of the answer counts as that.
    """

    def __init__(self, model, *args):
        super().__init__(*args)
        self._model, self._start, self._answer, self._expected = model, 0, [], None

    @property
    def answers(self):
        """Whether a token that comes next belongs to the answer."""
        return self.n_past == self._expected

    def begin(self, ids, sampler=None, wanted=True):
        """Begin a step, which runs when it is finished."""
        return types.SimpleNamespace(finish=lambda: self.prefill(ids))

    def prefill(self, ids, progress=None, observe=None):
        """Append tokens of a prompt, or of an answer."""
        ids = [int(token) for token in ids]
        self._check_fits(len(ids))
        follows = len(ids) == 1 and self.answers
        self.append(ids)
        if not follows:
            self._start, self._answer = self.n_past, self._model.answer_ids(self.tokens)
        time.sleep(self._model.seconds)
        n = self.n_past - self._start
        token = self._answer[n] if n < len(self._answer) else self._model.end
        self._expected = self.n_past
        logits = np.full(self._model.config.n_vocab, -100, np.float32)
        logits[token] = 100
        return logits


class _Runner:
    """What a Batch runs several sessions with."""
    depth, samples, observes, error = 1, False, True, None

    def __init__(self, sessions, backends):
        self._sessions, self.backends = sessions, backends

    def check_room(self, setup, n, what):
        """There is room."""

    def bind_together(self, variant, parts, n_outputs, again=False, late=()):
        """The step of the sessions with these caches."""
        return _Together([(self._sessions[id(caches)], n) for caches, n in parts], n_outputs)


class _Together:
    def __init__(self, parts, n_outputs):
        self._parts, self._n_outputs = parts, n_outputs

    def begin(self, tokens, positions, logits, hooks=(), samplers=None):
        """Write the logits after the last token of each session."""
        ids, at = {}, 0
        for session, n in self._parts:
            ids.setdefault(session, []).extend(tokens[at:at + n])
            at += n
        for row, (session, _) in zip(logits, self._parts[-self._n_outputs:]):
            row[:] = session.prefill(ids[session])
            del session.tokens[-len(ids[session]):]        # the batch appends them
        return Done()


class Scripted:
    """What a Scripted model has beside a Model.

    writes: the text that it writes, or a function of the prompt's text; special tokens in it are tokens. seconds: the time of each step.
    """
    writes, seconds = "", 0.0

    def session(self):
        """A new session."""
        session = ScriptedSession(self, self._runner, self.setup, self.tokenizer)
        self._sessions[id(session.caches)] = session
        return session

    def answer_ids(self, tokens):
        """The ids of the answer to a prompt."""
        text = self.writes if isinstance(self.writes, str) else self.writes(self.detokenize(tokens))
        return self.tokenizer.encode(text, parse_special=True)

    @property
    def end(self):
        """The token that ends a turn."""
        return min(self.tokenizer.eog_ids)


def scripted(name, path, **options):
    """A model that writes what it is told in a format.

    name: of FORMATS. path: of any model with a vocabulary of 300. options: for load().
    """
    special, template, end, _ = FORMATS[name]
    model = pydsa.load(path, **{"n_ctx": 4096, "device": "reference"} | options)
    model.__class__ = type("ScriptedModel", (Scripted, type(model)), {})
    model._runner, model._sessions = model.runner, {}
    model.runner = _Runner(model._sessions, model.runner.backends)
    unused = {f"<|unused_{i}|>": CONTROL for i in range(model.config.n_vocab - len(small(special, []).tokens))}
    model.tokenizer = tokenizer = small(special | unused, [])
    tokenizer.chat_template, tokenizer.eog_ids = template, frozenset(tokenizer.encode(end, parse_special=True))
    return model
