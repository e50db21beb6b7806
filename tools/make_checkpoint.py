"""Make tiny random models with transformers, and what it computes of them.

    pip install torch transformers tiktoken compressed-tensors      # in an environment of its own: pydsa needs none of them
    python tools/make_checkpoint.py tests/data/checkpoints

For each model a folder as those of published models, and NAME.npz: `tokens`, `logits` (float32 [n, n_vocab], computed in float64 but for
the norms, which transformers computes in float32); for v3 also `halves`, the logits with rope_interleave false. kimi has a tokenizer only,
and the ids that tiktoken gives for TEXTS. forms.safetensors has matrices as compressed-tensors stores them, and what it reads in them.
"""
import base64
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

N_VOCAB, N_TOKENS = 320, 72
TEXTS = ["Sparse attention", " 12345 tokens, 67 keys", "it's theirs; we'll see", "稀疏注意力2024年", "a\n\n  b\t c  ", "naïve café 🙂", ""]
SIZES = dict(vocab_size=N_VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=32, q_lora_rank=48,
             qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=24, first_k_dense_replace=1, max_position_embeddings=4096,
             routed_scaling_factor=2.5, bos_token_id=0, eos_token_id=1)
# With fewer heads many scores are exactly 0, no head being above 0, and equal scores may be chosen in any order. llama.cpp's indexers have
# heads of 64 values or more.
INDEXER = dict(index_topk=8, index_head_dim=64, index_n_heads=8)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": 1000000.0}
MODELS = {
    "v32": ("DeepseekV32", dict(n_group=2, topk_group=1, rope_parameters=YARN, **INDEXER)),
    "glm": ("GlmMoeDsa", dict(n_group=1, topk_group=1, rope_parameters=PLAIN, rms_norm_eps=1e-6, indexer_types=["full", "full", "shared"],
                              **INDEXER)),
    "v3": ("DeepseekV3", dict(n_group=4, topk_group=2, rope_parameters=YARN)),
    "v2": ("DeepseekV2", dict(n_group=1, topk_group=1, rope_parameters=PLAIN, q_lora_rank=None, routed_scaling_factor=1.0,
                              topk_method="greedy")),
}
DEEPSEEK_V3 = ["\\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
               "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
               "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]
GLM4 = ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]
DEEPSEEK_CODER = ["[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", "\\p{N}"]
HAN, WORD = "\\p{Han}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
UPPER, LOWER = (f"[{case}\\p{{Lm}}\\p{{Lo}}\\p{{M}}&&[^{HAN}]]" for case in ("\\p{Lu}\\p{Lt}", "\\p{Ll}"))
KIMI = "|".join([f"[{HAN}]+", f"[^\\r\\n\\p{{L}}\\p{{N}}]?{UPPER}*{LOWER}+{WORD}", f"[^\\r\\n\\p{{L}}\\p{{N}}]?{UPPER}+{LOWER}*{WORD}",
                 "\\p{N}{1,3}", " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*", "\\s*[\\r\\n]+", "\\s+(?!\\S)", "\\s+"])
TOKENIZERS = {
    "v32": (DEEPSEEK_V3, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"], {}),
    "glm": (GLM4, ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"],
            {"eos_token": "<|endoftext|>",
             "chat_template": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"}),
    "v3": (DEEPSEEK_V3, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
           {"add_bos_token": True, "add_eos_token": False, "bos_token": {"content": "<｜begin▁of▁sentence｜>"},
            "eos_token": {"content": "<｜end▁of▁sentence｜>"}}),
    "v2": (DEEPSEEK_CODER, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], {"add_bos_token": True}),
}


def byte_alphabet():
    """{character: byte} of GPT-2's byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_alphabet()


def write_tokenizer(folder, name):
    """A byte-level BPE of Python's documentation, in the files of a model."""
    from pydoc_data.topics import topics
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    regexes, special, config = TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "glm"))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=N_VOCAB - 4, show_progress=False, special_tokens=special,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([topics[topic] for topic in sorted(topics)], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])     # not special
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}) + "\n")


def write_kimi(folder):
    """A tokenizer as Kimi K2 has it, and the ids of tiktoken."""
    import tiktoken
    from pydoc_data.topics import topics
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    n_base, n_vocab = 300, N_VOCAB
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(KIMI), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.train_from_iterator([topics[topic] for topic in sorted(topics)], trainers.BpeTrainer(
        vocab_size=n_base, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(BYTE_OF[character] for character in token): rank for rank, (token, _) in enumerate(learned)}
    named = {300: "[BOS]", 301: "[EOS]", 302: "<|im_end|>", 303: "<|im_user|>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in named.items()}, "bos_token": "[BOS]",
        "eos_token": "[EOS]", "tokenizer_class": "TikTokenTokenizer", "chat_template": "{{ messages[0].content }}",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}) + "\n")
    special = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(n_base, n_vocab)}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=special)
    (folder.parent / "kimi.json").write_text(json.dumps({text: encoding.encode(text) for text in TEXTS}, ensure_ascii=False) + "\n")


FORMS = {
    "int4": dict(num_bits=4, strategy="group", group_size=32, symmetric=True),
    "int4-zero": dict(num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int8": dict(num_bits=8, strategy="channel", symmetric=True),
    "nvfp4": dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True),
    "mxfp4": dict(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True),
}


def write_forms(path):
    """Matrices as compressed-tensors stores them, with what it reads in them.

    NAME.expected are the values, float32. All codes of the types of eight bits are there too.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file
    generator, found, kinds = torch.Generator().manual_seed(2), {}, {"int4": "pack-quantized", "int8": "pack-quantized",
                                                                     "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
    for name, options in FORMS.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**options))
        n, k, group = 20, 96, options.get("group_size") or 96
        parts = {"weight": torch.randn(n, k, generator=generator), "weight_scale": 2.0 ** torch.randint(-4, 0, (n, k // group))}
        if options.get("strategy") == "group" and options.get("type") != "float":
            parts["weight_scale"] = torch.rand(n, k // group, generator=generator) / 4 + 0.01
        if not options["symmetric"]:
            parts["weight_zero_point"] = torch.randint(-8, 8, (n, k // group), generator=generator, dtype=torch.int8)
        if name == "nvfp4":
            parts["weight_global_scale"] = torch.tensor([8.0])
        compressor = BaseCompressor.get_value_from_registry(kinds[name.removesuffix("-zero")])
        stored = compressor.compress(parts, scheme)
        found |= {f"{name}.{part}": value.contiguous() for part, value in stored.items()}
        found[f"{name}.expected"] = compressor.decompress(stored, scheme)["weight"].float()
    for name in "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu":
        codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
        found |= {f"{name}.weight": codes, f"{name}.expected": codes.float()}
    save_file(found, str(path))


def set_weights(model):
    """Random weights, rounded to bfloat16, that make products of size one."""
    import torch
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name and name.endswith("weight"):
                values = 1 + 0.1 * noise
            elif parameter.ndim < 2:
                values = 0.1 * noise
            else:
                sharper = 2.0 if re.search(r"[^k]v?_?q_(b_)?proj|wq_b|lm_head", name) else 1.0
                values = sharper * noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
            parameter.copy_(values.to(torch.bfloat16).to(parameter.dtype))


def make(folder, name):
    """Write one model, its tokenizer, and its logits."""
    import torch
    import transformers
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | options, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    set_weights(model)
    shutil.rmtree(folder / name, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="150KB" if name == "v32" else "1GB")
    write_tokenizer(folder / name, name)
    for unused in "generation_config.json", "README.md":
        (folder / name / unused).unlink(missing_ok=True)
    tokens = torch.tensor(np.random.default_rng(len(name)).integers(4, N_VOCAB - 4, N_TOKENS))[None]
    model = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        folder / name, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        found = {"tokens": tokens[0].numpy(), "logits": model(tokens).logits[0].float().numpy()}
        if name == "v3":
            model.config.rope_interleave = False
            for layer in model.model.layers:
                layer.self_attn.config.rope_interleave = False
            found["halves"] = model(tokens).logits[0].float().numpy()
    np.savez_compressed(folder / f"{name}.npz", **found)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints")
    target.mkdir(parents=True, exist_ok=True)
    for model_name in MODELS:
        make(target, model_name)
    write_kimi(target / "kimi")
    write_forms(target / "forms.safetensors")
