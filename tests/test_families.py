"""Published models: their metadata, and small models of their shapes.

The figures are those of each model's config.json, with the keys that llama.cpp's converter makes of them. That of GigaChat3-10B was not at
hand: its figures come to the published parameters, and to the 11.4 GB of a published file in Q8_0.
"""
import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from chat_cases import QUESTION, SYSTEM, TOOL, small
from helpers import nmse, random_ids

import pydsa
from pydsa.backends.devices import simulated_gpus
from pydsa.chat import encode_chat
from pydsa.cli.report import describe, format_report, token_bytes
from pydsa.fitting import fitted
from pydsa.gguf.file import GGUFFile, Metadata, Tensor
from pydsa.models.yarn import rope_from_metadata
from pydsa.quants import TYPES
from pydsa.setup import Setup
from pydsa.stages.division import Node, Parts, divide
from pydsa.stages.forecast import CHUNK, Link, Times, chunks, forecast, one_stream, prompt_seconds, wire_of
from pydsa.text.tokenizer import CONTROL, PRE_TOKENIZERS
from tools.make_model import ModelSpec, make_model, model_keys, tensor_shapes, tensor_type
from tools.simulate_stages import simulated

DATA, ROOT, IDS = Path(__file__).parent / "data", Path(__file__).parent.parent, random_ids(40)
YARN = dict(rope_scaling="yarn", rope_factor=40.0, n_ctx_orig=4096, yarn_log_multiplier=0.1)
V3 = dict(arch="deepseek2", n_layer=61, n_layer_dense=3, n_embd=7168, n_head=128, n_lora_q=1536, n_lora_kv=512, n_nope=128, n_rot=64,
          n_v=128, n_ff=18432, n_expert=256, n_expert_used=8, n_expert_shared=1, n_ff_exp=2048, n_expert_groups=8, n_group_used=4,
          expert_gating_func="sigmoid", expert_weights_scale=2.5, n_ctx=163840, n_vocab=129280, pre="deepseek-v3", **YARN)
V2 = V3 | dict(n_layer=60, n_layer_dense=1, n_embd=5120, n_ff=12288, n_expert=160, n_expert_used=6, n_expert_shared=2, n_ff_exp=1536,
               n_group_used=3, expert_gating_func="softmax", expert_weights_scale=16.0, expert_weights_norm=False, exp_probs_b=False,
               n_vocab=102400, pre="deepseek-llm", yarn_log_multiplier=0.0707)
LITE = V2 | dict(n_layer=27, n_embd=2048, n_head=16, n_lora_q=0, n_ff=10944, n_expert=64, n_ff_exp=1408, n_expert_groups=1, n_group_used=1,
                 expert_weights_scale=1.0)
DSA = dict(arch="deepseek32", indexer_n_head=64, indexer_head_size=128, indexer_top_k=2048)
KIMI = V3 | dict(n_layer_dense=1, n_head=64, n_expert=384, n_expert_groups=1, n_group_used=1, expert_weights_scale=2.827, rms_eps=1e-5,
                 n_ctx=262144, freq_base=50000.0, rope_factor=64.0, yarn_beta=1.0, n_vocab=163840, pre="kimi-k2")
MOONLIGHT = LITE | dict(n_ff=11264, expert_gating_func="sigmoid", expert_weights_scale=2.446, expert_weights_norm=True, exp_probs_b=True,
                        rms_eps=1e-5, n_ctx=8192, freq_base=50000.0, rope_scaling="absent", n_vocab=163840, pre="kimi-k2")
GIGACHAT = MOONLIGHT | dict(n_layer=26, n_embd=1536, n_head=32, n_v=192, n_ff=8960, n_expert_used=4, n_expert_shared=1, n_ff_exp=1280,
                            expert_weights_scale=1.0, rms_eps=1e-6, n_ctx=262144, freq_base=100000.0, n_vocab=128256, pre="gigachat")
GLM = V3 | DSA | dict(arch="glm-dsa", n_layer=78, n_embd=6144, n_head=64, n_lora_q=2048, n_nope=192, n_v=256, n_ff=12288, n_expert_groups=1,
                      n_group_used=1, rms_eps=1e-5, n_ctx=202752, freq_base=1e6, rope_scaling="absent", nextn=1, indexer_n_head=32,
                      n_vocab=154880, pre="glm4")
FLASH = GLM | dict(arch="deepseek2", n_layer=47, n_layer_dense=1, n_embd=2048, n_head=20, n_lora_q=768, n_ff=10240, n_expert=64,
                   n_expert_used=4, n_ff_exp=1536, expert_weights_scale=1.8)
FAMILIES = {    # name: (full size, published parameters in 10^9, and those that a token uses)
    "DeepSeek-V2": (V2, 236, 21), "DeepSeek-V2-Lite": (LITE, 15.7, 2.4),
    "DeepSeek-V3": (V3, 671, 37), "DeepSeek-V3.2": (V3 | DSA, 671, 37),
    "Kimi-K2": (KIMI, 1026, 32), "Moonlight": (MOONLIGHT, 16, 3), "GLM-5": (GLM, 744, 40),
    "GLM-5.2": (GLM | dict(n_ctx=1 << 20, freq_base=8e6), 744, 40), "GLM-4.7-Flash": (FLASH, 30, 3.6),
    "GigaChat3-10B": (GIGACHAT, 10.6, 1.8),
}
INDEXED = {"DeepSeek-V3.2": 61, "GLM-5": 78, "GLM-5.2": 21}       # layers that have an indexer
KQ_SCALES = {"DeepSeek-V2": 0.1147214, "DeepSeek-V2-Lite": 0.1147214, "DeepSeek-V3": 0.1352338, "DeepSeek-V3.2": 0.1352338,
             "Kimi-K2": (1 + 0.1 * math.log(64)) ** 2 / 192 ** 0.5, "GLM-5": 1 / 16, "GLM-5.2": 1 / 16, "GLM-4.7-Flash": 1 / 16}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def full_size_file(family, kind):
    """A published model's file, of which it has none of the gigabytes.

    All bytes of a tensor are one byte. kind: its type, as make_model's.
    """
    spec = ModelSpec(**FAMILIES[family][0], type=kind)
    metadata = Metadata({"general.architecture": spec.arch, "general.name": family, "tokenizer.ggml.model": "gpt2",
                         "tokenizer.ggml.pre": spec.pre, **{f"{spec.arch}.{key}": value for key, value in model_keys(spec).items()
                                                            if value is not None}}, "model.gguf")
    tensors = {}
    for name, shape in tensor_shapes(spec).items():
        kind = tensor_type(spec, name, shape).name
        row = shape[-1] // TYPES[kind].size * TYPES[kind].dtype.itemsize
        data = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (*shape[:-1], row), (0,) * len(shape))
        tensors[name] = Tensor(name, kind, shape, data)
    return GGUFFile(metadata, tensors, ["model.gguf"], sum(tensor.data.nbytes for tensor in tensors.values()), 3, [list(tensors)])


@pytest.fixture
def full_size(family, monkeypatch):
    """full_size(**options) -> the Setup of a published model.

    It is in Q4_K_M, or in another type.
    """
    files = functools.cache(functools.partial(full_size_file, family))

    def setup(kind="Q4_K_M", **options):
        monkeypatch.setattr("pydsa.setup.open_gguf", lambda path, absent: files(kind))
        return Setup("model.gguf", **options)
    monkeypatch.setattr("pydsa.setup.open_gguf", lambda path, absent: files("Q4_K_M"))
    return setup


def test_full_size(family, full_size):
    setup = full_size()
    spec, total, active = ModelSpec(**FAMILIES[family][0]), *FAMILIES[family][1:]
    config = setup.config
    experts = (config.n_layer - config.n_layer_dense_lead) * 3 * config.n_embd * config.n_ff_exp[-1] * config.n_expert
    most = (setup.n_params - experts * (1 - config.n_expert_used / config.n_expert)) / 1e9
    least = most - config.n_vocab * config.n_embd / 1e9     # without the embedding, of which a token uses one row
    assert setup.n_params / 1e9 == pytest.approx(total, rel=0.02)
    assert least * 0.97 < active < most * 1.03
    assert (config.n_layer, config.n_layer_nextn, config.n_ctx_train) == (spec.n_layer, spec.nextn, spec.n_ctx)
    assert (config.q_lora, config.n_nope, config.n_v) == (spec.n_lora_q, spec.n_nope, spec.n_v)
    assert config.kq_scale == pytest.approx(KQ_SCALES.get(family, 192 ** -0.5), rel=1e-6)
    assert len(set(config.indexed_layers or ())) == INDEXED.get(family, 0)
    assert spec.pre in PRE_TOKENIZERS


def test_info_of_full_size(family, full_size):
    setup = full_size(n_ctx=4096)
    spec, text = ModelSpec(**FAMILIES[family][0]), format_report(describe(setup))
    assert text.startswith(f"{family}: {spec.arch}, ") and "not supported" not in text and f"gpt2, {spec.pre}; chat format" in text
    assert f"{spec.n_expert_used} of {spec.n_expert} experts" in text and "Q4_K " in text and "Q6_K " in text
    assert ("MTP block(s)" in text) == bool(spec.nextn)
    assert ("dense up to 2048 tokens" if family in INDEXED else "dense (the model has no indexer)") in text


@pytest.mark.parametrize("family", ["DeepSeek-V3.2"])
def test_plans_in_the_docs(full_size):
    """The table of docs/placement.md is what plans for such GPUs say."""
    assert full_size is not None        # which stands in for the file
    rows = re.findall(r"^\| (?:(\d) x )?(\d+) GiB \| `(.*)` \| (\S+) GiB \| (\S+), (\S+) GiB \| (\S+) \| (\S+) \|$",
                      (ROOT / "pydsa/docs/placement.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for n, size, options, weights, *figures in rows[::2]:
        gpus = simulated_gpus([int(size) << 30] * int(n or 1))
        setup = fitted("model.gguf", gpus=gpus)
        assert setup.plan.options == f"--device {','.join(gpus)} {options}"
        on_gpus = sum(share.weights for share in setup.plan.shares if share.device in gpus) / 2**30
        read = {name: n_bytes / 2**30 for name, n_bytes in token_bytes(setup).items()}
        bounds = [describe(setup, (rate, 1000e9))["plan"]["bound_ts"] for rate in (100e9, 300e9)]
        found = [on_gpus, read["cpu"], sum(read.values()) - read["cpu"], *bounds]
        assert [f"{x:.1f}" for x in found] == [weights, *figures]


@pytest.mark.parametrize("family", ["DeepSeek-V3.2", "GLM-5"])
def test_stages_in_the_docs(family, full_size):
    """A table of docs/stages.md is what `pydsa info --stages` says."""
    rows = re.findall(rf"^\| {family.removeprefix('DeepSeek-')} (\S+) \| (\d+) \| (\S+) \| (\S+) GiB \| (.*) \|$",
                      (ROOT / "pydsa/docs/stages.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    setups = functools.cache(lambda kind: full_size(kind, n_ubatch=CHUNK))
    for kind, n, layers, largest, figures in rows[::2]:
        setup, columns = setups(kind), []
        for bandwidth, rate in ((100e9, 1500e9), (300e9, 4500e9)):
            nodes = [Node(f"node {i + 1}", bandwidth, rate=rate) for i in range(int(n))]
            found = forecast(setup, divide(setup, nodes, len(nodes)), nodes, Link(1.25e9, 100e-6))
            columns.append([f"{found['one']['ts']:.2g}", f"{found['many']['ts']:.2g}", f"{found['prompt']['ts']:.0f}"])
        assert (found["options"], figures.split(" | ")) == (f"--stages {layers}", [", ".join(pair) for pair in zip(*columns)])
        assert f"{max(sum(stage[key] for key in ('weights', 'caches', 'scratch')) for stage in found['stages']) / 2**30:.0f}" == largest


@pytest.mark.parametrize("family", ["DeepSeek-V3.2"])
def test_what_the_docs_say_of_the_network(full_size):
    text, setup, link = (ROOT / "pydsa/docs/stages.md").read_text(), full_size("Q8_0", n_ubatch=CHUNK), Link(125e6, 300e-6)
    text, wire, lost = " ".join(text.split()), wire_of(setup), []
    for n, rate in ((3, 100e9), (8, 300e9)):
        nodes, parts = [Node("", rate, rate=15 * rate)] * n, Parts(setup)
        seconds = [parts.share(layers, nodes[0]).seconds for layers in divide(setup, nodes)]
        one = one_stream(seconds, link, wire)
        lost.append((f"{1e3 * (one - sum(seconds)):.1f} ms of", f"{1e3 * one:.0f}"))
    assert f"three nodes of 100 GB/s lose {lost[0][0]} a token's {lost[0][1]}." in text
    assert f"eight of 300 GB/s lose {' '.join(lost[1])}." in text
    assert f"V3.2 sends {wire.step(1) / 2**10:.1f} KiB a token and hop" in text
    times, fast = Times(setup, divide(setup, nodes), nodes), Link(1.25e9, 100e-6)
    rates = [f"{4096 / prompt_seconds(times.prompt, fast, wire, chunks(4096, most=most), 9):.0f}" for most in (256, 512)]
    assert f"eight nodes of 300 GB/s read it at {rates[0]} instead of {rates[1]} t/s" in text
    assert f"A chunk of 512 tokens is {wire.step(512) / 2**20:.0f} MiB, {1e3 * link.seconds(wire.step(512)):.0f} ms" in text
    assert f"{full_size(n_ctx=163840).cache_bytes / 2**30:.1f} GiB over all nodes for each conversation of V3.2 with its 163,840" in text


@pytest.mark.parametrize("family", ["DeepSeek-V3.2"])
def test_losses_in_the_docs(full_size):
    """Another table of docs/stages.md is what simulations find.

    Within two percent, for one of its rows.
    """
    row = re.search(r"^\| 8 \| (\d+), (\d+)% \| (\d+), (\d+)% \| (\d+)% \| (\d+)% \|$", (ROOT / "pydsa/docs/stages.md").read_text(),
                    re.MULTILINE)
    setup, link = full_size("Q8_0", n_ubatch=CHUNK), Link(1.25e9, 100e-6)
    found = [simulated(setup, None, [8], 300, 4500, link, wire_of(setup), None, 512, 150, {chance: value})[0]
             for chance, value in (("jitter", 500e-6), ("jitter", 5e-3), ("spread", 0.1), ("spread", 0.3))]
    lost = [-100 * one[key] for one, keys in zip(found, (("one: off", "many: off"),) * 2 + (("many: off",),) * 2) for key in keys]
    assert [int(figure) for figure in row.groups()] == pytest.approx(lost, abs=2)


@pytest.mark.parametrize("key, value", [("model", "llama"), ("pre", "kanana2"), ("pre", None)])
@pytest.mark.parametrize("family", ["GigaChat3-10B"])
def test_info_says_that_a_tokenizer_is_not_supported(full_size, key, value):
    metadata = full_size().file.metadata
    metadata.pop(f"tokenizer.ggml.{key}")
    if value:
        metadata[f"tokenizer.ggml.{key}"] = value
    report = describe(full_size())
    assert not report["tokenizer"]["supported"]
    assert "(not supported, expected gpt2 with one of deepseek-llm, " in format_report(report)


def test_the_whole_context_is_allowed(family, full_size):
    setup = full_size(n_ctx=FAMILIES[family][0]["n_ctx"])
    rows = setup.config.n_layer * (2 * 512 + 4 + 2 * 64 + 4)        # int16 with a float32 scale for each part
    rows += INDEXED.get(family, 0) * (128 + 4)
    assert setup.cache_bytes == setup.n_ctx * rows


def test_gating_of_files_that_lack_the_key(family, full_size):
    """As in llama.cpp: sigmoid for GLM, softmax for other deepseek2.

    GLM-4.7-Flash is a deepseek2; its number of layers and its vocabulary tell it.
    """
    setup = full_size()
    setup.file.metadata.pop(f"{setup.config.architecture}.expert_gating_func")
    if setup.config.architecture == "deepseek32":
        with pytest.raises(pydsa.GGUFError, match="expert_gating_func"):
            full_size()
    else:
        assert full_size().config.gating == (2 if "GLM" in family else 1)


# Small models

def scaled(spec, n_layer):
    """The spec with small widths, in about the same proportions.

    The keys are those of its family. llama.cpp needs 64 numbers in an indexer head, and enough heads that no score is exactly 0, where two
    scores would be equal.
    """
    n_expert = spec.n_expert // (10 if spec.n_expert == 160 else 16 if spec.n_expert > 64 else 8)
    types = "FFFSSSFSSS"[:n_layer] if spec.n_ctx >= 1 << 20 else ""
    return dataclasses.replace(
        spec, type="F32", n_layer=n_layer, n_layer_dense=1, n_embd=spec.n_embd // 64, n_head=max(2, spec.n_head // 16),
        n_lora_q=spec.n_lora_q // 32, n_lora_kv=32, n_nope=spec.n_nope // 8, n_rot=8, n_v=spec.n_v // 8, n_ff=spec.n_ff // 128,
        n_expert=n_expert, n_ff_exp=spec.n_ff_exp // 64, indexer_n_head=spec.indexer_n_head // 2, indexer_head_size=64,
        indexer_top_k=12, indexer_types=types, n_vocab=300)


@pytest.fixture(scope="session")
def scaled_model(tmp_path_factory):
    """scaled_model("GLM-5") -> the path of a small model of that family.

    Further arguments replace fields of its ModelSpec.
    """
    @functools.lru_cache
    def make(family, **changes):
        spec = ModelSpec(**FAMILIES[family][0])
        # llama.cpp tells models without q_lora by these numbers of layers
        n_layer = spec.n_layer if spec.n_layer < 30 else 7 if family == "GLM-5.2" else 3
        return make_model(tmp_path_factory.mktemp("family") / f"{family}.gguf", dataclasses.replace(scaled(spec, n_layer), **changes))
    return make


def test_logits_are_those_of_the_reference(family, scaled_model, load):
    path = scaled_model(family)
    expected = load(path, device="reference").logits(IDS)
    assert np.isfinite(expected).all() and len(set(expected.argmax(1).tolist())) > 10
    assert nmse(load(path).logits(IDS), expected).max() < 1e-8
    session = load(path).session()
    session.prefill(IDS[:-2])
    assert nmse([session.decode(token) for token in IDS[-2:]], expected[-2:]).max() < 1e-8


def test_logits_are_those_of_llama_cpp(family, scaled_model, load):
    """data/families.npz holds llama.cpp's logits at positions 19 and 39.

    Its caches were float32. The logits are of the models that make_model writes with numpy's random stream of today. llama.cpp does not
    read Kimi K2's yarn_beta keys, so that its model has none here.
    """
    path = scaled_model(family, yarn_beta=0.0) if family == "Kimi-K2" else scaled_model(family)
    with np.load(DATA / "families.npz") as stored:
        expected = stored[family]
    assert nmse(load(path).logits(IDS)[[19, 39]], expected).max() < 1e-8


def test_yarn_of_kimi_k2():
    """Frequencies that turn once in 4,096 tokens are kept, others divided.

    That is what beta_fast = beta_slow = 1 says.
    """
    keys = model_keys(ModelSpec(**KIMI))
    rope = rope_from_metadata(Metadata({f"x.{key}": value for key, value in keys.items() if value is not None}), "x", 64, 262144)
    plain = 50000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(rope.freqs, np.where(4096 * plain >= 2 * np.pi, plain, plain / 64), rtol=1e-12)


# Chat formats, in small templates of their own: the markers are those of the published templates

KIMI_CHAT = """{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
<|im_{{ m.role if m.role in ['user', 'assistant'] else 'system' }}|>{{ m.get('name') or m.role }}<|im_middle|>
{%- if m.role == 'tool' %}## Return of {{ m.tool_call_id }}
{% endif -%}{{ m.content }}
{%- if m.get('tool_calls') -%}<|tool_calls_section_begin|>
{%- for call in m.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
KIMI_TOKENS = [f"<|{name}|>" for name in (
    "im_system", "im_user", "im_assistant", "im_middle", "im_end", "tool_calls_section_begin", "tool_calls_section_end", "tool_call_begin",
    "tool_call_argument_begin", "tool_call_end")] + ["[BOS]", "[EOS]", "[EOT]"]
GIGACHAT_CHAT = """{{- bos_token -}}
{%- for m in messages -%}{{ m.role ~ '<|role_sep|>' ~ m.content ~ '<|message_sep|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant' ~ '<|role_sep|>' }}{%- endif -%}"""
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "functions.weather:0", "type": "function", "function": {"name": "weather", "arguments": {"città": "Oslo"}}}]}
RESULT = {"role": "tool", "tool_call_id": "functions.weather:0", "content": "<|im_end|>rain"}


def test_chat_of_kimi_k2():
    tokenizer = small(dict.fromkeys(KIMI_TOKENS, CONTROL), pre="kimi-k2")
    ids = encode_chat(tokenizer, [SYSTEM, QUESTION, CALL, RESULT], tools=[TOOL], template=KIMI_CHAT)
    begin, call = "<|im_system|>tool_declare<|im_middle|>[", '<|tool_call_argument_begin|>{"città": "Oslo"}<|tool_call_end|>'
    text = tokenizer.decode(ids)
    assert text.startswith(begin + '{"type": "function", "function": {"name": "weather"')
    assert text.endswith(
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>1+1=?<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0{call}"
        "<|tool_calls_section_end|><|im_end|><|im_system|>tool<|im_middle|>## Return of functions.weather:0\n<|im_end|>rain<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>")
    tokens = [tokenizer.tokens[token_id] for token_id in ids]
    assert tokens.count("<|im_end|>") == 5      # the one in the tool's result stays text
    assert "<|tool_call_argument_begin|>" in tokens and tokens[-1] == "<|im_middle|>"


def test_chat_of_gigachat():
    tokenizer = small({"<bos>": CONTROL, "<|role_sep|>": CONTROL, "<|message_sep|>": CONTROL}, pre="gigachat")
    ids = encode_chat(tokenizer, [SYSTEM, QUESTION], template=GIGACHAT_CHAT)
    assert tokenizer.decode(ids) == (
        "<bos>system<|role_sep|>Be brief.<|message_sep|>user<|role_sep|>1+1=?<|message_sep|>assistant<|role_sep|>")
    assert [tokenizer.tokens[token_id] for token_id in ids].count("<|role_sep|>") == 3
