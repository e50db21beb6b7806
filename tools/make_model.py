"""Write a random model as a GGUF file.

    python tools/make_model.py small.gguf
    python tools/make_model.py --preset 0.5b --type Q4_K_M bench.gguf
    python tools/make_model.py --preset 0.5b --mix UD-IQ2_M mixed.gguf
    python tools/make_model.py --arch glm-dsa --n-layer 6 --indexer-types FFFSSS --no-indexer-shared-tensors glm.gguf

Any size, three architectures, all common types, the mixes of types of real files (mixes.py), and a working tokenizer. From Python:
`make_model("small.gguf", ModelSpec(arch="deepseek2", type="Q4_0"))`. The same options give the same bytes with the same Python, numpy,
tokenizers and kind of CPU. Models that differ only in `type` or `mix` hold the same weights, rounded.
"""

import json
import sys
import zlib
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import prod
from pathlib import Path

import click
import gguf
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.quantization import TYPES  # noqa: E402
from tools.mixes import FILE_TYPES, MIXES, file_type, tensor_type  # noqa: E402

ARCHITECTURES = ("deepseek32", "glm-dsa", "deepseek2")
GATING = {"absent": 0, "softmax": 1, "sigmoid": 2, "softmax_weight": 3}
PRE = {"deepseek32": "deepseek-v3", "glm-dsa": "glm4", "deepseek2": "deepseek-llm"}
FIRST_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
LAST_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
MIN_VOCAB = 256 + len(FIRST_TOKENS) + len(LAST_TOKENS)
LONG_CONTEXT = 1 << 20     # from this length on glm-dsa has shared indexer layers although no key says so
AT_ONCE = 1 << 18          # weights that are made and quantized at a time, so few that they stay in a core's cache


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelSpec:
    """The model to write.

    Sizes have llama.cpp's names. 0 means that the model has no such thing and no key says so.
    """
    arch: str = option("deepseek32", "deepseek32, glm-dsa or deepseek2")
    type: str = option("Q8_0", "type of the matrices: " + " ".join(FILE_TYPES))
    mix: str = option("", "instead of the type, the mix of types of a real file: " + " ".join(MIXES))
    seed: int = option(0, "seed of the weights")
    n_layer: int = option(3, "layers, without the MTP block")
    n_layer_dense: int = option(1, "leading layers without experts")
    n_embd: int = option(256, "width of the residual stream")
    n_head: int = option(4, "attention heads")
    n_lora_q: int = option(256, "rank of the queries; 0: attn_q instead (deepseek2 only)")
    n_lora_kv: int = option(256, "width of the latent")
    n_nope: int = option(64, "numbers of a key without RoPE")
    n_rot: int = option(32, "numbers of a key with RoPE")
    n_v: int = option(64, "numbers of a value")
    n_ff: int = option(512, "width of the dense feed-forward layers")
    n_expert: int = option(8, "experts")
    n_expert_used: int = option(2, "experts per token")
    n_expert_shared: int = option(1, "shared experts")
    n_ff_exp: int = option(256, "width of an expert")
    n_expert_groups: int = option(2, "groups of experts")
    n_group_used: int = option(1, "groups per token")
    expert_gating_func: str = option("sigmoid", "softmax, sigmoid, softmax_weight or absent")
    expert_weights_norm: bool = option(True, "weights of the chosen experts sum to one")
    expert_weights_scale: float = option(2.5, "factor of the experts' weights")
    exp_probs_b: bool = option(True, "a bias that takes part in the choice of experts")
    indexer_n_head: int = option(16, "indexer heads")
    indexer_head_size: int = option(64, "width of an indexer head")
    indexer_top_k: int = option(64, "keys that a token attends to")
    indexer_types: str = option("", "F (full) or S (shared) for each layer, such as FFS (glm-dsa)")
    indexer_shared_tensors: bool = option(False, "write unused indexer tensors into shared layers too")
    quantize_indexer_proj: bool = option(False, "store indexer.proj in the type of the matrices, not in F32")
    n_ctx: int = option(4096, "context length")
    rms_eps: float = option(1e-6, "epsilon of the RMS norms")
    freq_base: float = option(10000.0, "RoPE base")
    rope_scaling: str = option("yarn", "yarn, linear, none, ... or absent")
    rope_factor: float = option(4.0, "RoPE scaling factor")
    n_ctx_orig: int = option(1024, "context length before the scaling")
    yarn_log_multiplier: float = option(0.1, "0.1 times mscale_all_dim")
    yarn_beta: float = option(0.0, "yarn_beta_fast and yarn_beta_slow, as Kimi K2 has them")
    nextn: int = option(0, "MTP blocks, 0 or 1")
    legacy_kv_b: bool = option(False, "one attn_kv_b instead of attn_k_b and attn_v_b (deepseek2)")
    tied_output: bool = option(False, "no output.weight: the embedding serves")
    n_vocab: int = option(512, "vocabulary, padded with unused tokens where training yields fewer")
    pre: str = option("", "pre-tokenizer; by default what the architecture's models have")
    chat_template: str = option("", "the text of a chat template")
    split_max_tensors: int = option(0, "split into files of at most so many tensors")

    def __post_init__(self):
        types, groups = self.indexer_types, self.n_expert_groups
        checks = {
            f"arch {self.arch!r} is none of {', '.join(ARCHITECTURES)}": self.arch in ARCHITECTURES,
            f"type {self.type!r} is a mix of types: give it as mix": self.type in FILE_TYPES or self.type not in MIXES,
            f"type {self.type!r} is none of {', '.join(FILE_TYPES)}": self.type in FILE_TYPES,
            f"mix {self.mix!r} is none of {', '.join(MIXES)}": not self.mix or self.mix in MIXES,
            f"expert_gating_func must be one of {', '.join(GATING)}": self.expert_gating_func in GATING,
            f"n_vocab must be at least {MIN_VOCAB}, for the bytes and the markers": self.n_vocab >= MIN_VOCAB,
            "n_layer_dense must be within 0 and n_layer": 0 <= self.n_layer_dense <= self.n_layer,
            "n_expert 0 needs n_layer_dense = n_layer": self.n_expert or self.n_layer_dense == self.n_layer,
            "n_expert_used must not exceed n_expert": self.n_expert_used <= self.n_expert or not self.n_expert,
            "n_expert_groups must divide n_expert": not groups or self.n_expert % groups == 0,
            "n_lora_q 0 is for deepseek2 only": self.n_lora_q or self.arch == "deepseek2",
            "legacy_kv_b is for deepseek2 only": not self.legacy_kv_b or self.arch == "deepseek2",
            "indexer_types is for glm-dsa only": not types or self.arch == "glm-dsa",
            "indexer_types must hold an F or S for each layer": not types or len(types) == self.n_layer,
            "indexer_types must hold only F and S, an F first": not set(types) - set("FS") and types[:1] in ("", "F"),
            "nextn must be 0 or 1": self.nextn in (0, 1),
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    def full_layers(self):
        """One bool a layer: whether it has an indexer of its own."""
        if self.indexer_types:
            return [c == "F" for c in self.indexer_types]
        if self.arch == "glm-dsa" and self.n_ctx >= LONG_CONTEXT:
            return [layer < 2 or layer % 4 == 2 for layer in range(self.n_layer)]
        return [self.arch != "deepseek2"] * self.n_layer


PRESETS = {
    "small": {},
    "0.5b": dict(
        n_embd=1024, n_layer=8, n_head=16, n_lora_q=512, n_lora_kv=512, n_nope=128, n_rot=64, n_v=128, n_ff=4096,
        n_expert=32, n_expert_used=4, n_ff_exp=512, n_expert_groups=4, n_group_used=2, indexer_head_size=128,
        indexer_top_k=512, n_ctx=163840, rope_factor=40.0, n_ctx_orig=4096, n_vocab=32768),
    "v3.2-layers": dict(
        n_embd=7168, n_layer=4, n_layer_dense=3, n_head=128, n_lora_q=1536, n_lora_kv=512, n_nope=128, n_rot=64,
        n_v=128, n_ff=18432, n_expert=64, n_expert_used=8, n_ff_exp=2048, n_expert_groups=8, n_group_used=4,
        indexer_n_head=64, indexer_head_size=128, indexer_top_k=2048, n_ctx=163840, rope_factor=40.0,
        n_ctx_orig=4096, n_vocab=129280),
}


def attention_shapes(spec):
    """The shapes of a layer's attention tensors."""
    heads, n_key = spec.n_head, spec.n_nope + spec.n_rot
    if spec.n_lora_q:
        queries = {"attn_q_a.weight": (spec.n_lora_q, spec.n_embd), "attn_q_a_norm.weight": (spec.n_lora_q,),
                   "attn_q_b.weight": (heads * n_key, spec.n_lora_q)}
    else:
        queries = {"attn_q.weight": (heads * n_key, spec.n_embd)}
    if spec.legacy_kv_b:
        keys = {"attn_kv_b.weight": (heads * (spec.n_nope + spec.n_v), spec.n_lora_kv)}
    else:
        keys = {"attn_k_b.weight": (heads, spec.n_lora_kv, spec.n_nope),
                "attn_v_b.weight": (heads, spec.n_v, spec.n_lora_kv)}
    latent = {"attn_kv_a_mqa.weight": (spec.n_lora_kv + spec.n_rot, spec.n_embd),
              "attn_kv_a_norm.weight": (spec.n_lora_kv,)}
    return {"attn_norm.weight": (spec.n_embd,), **queries, **latent, **keys,
            "attn_output.weight": (spec.n_embd, heads * spec.n_v)}


def indexer_shapes(spec):
    """The shapes of a layer's indexer tensors."""
    heads, size = spec.indexer_n_head, spec.indexer_head_size
    return {"indexer.attn_q_b.weight": (heads * size, spec.n_lora_q), "indexer.attn_k.weight": (size, spec.n_embd),
            "indexer.k_norm.weight": (size,), "indexer.k_norm.bias": (size,),
            "indexer.proj.weight": (heads, spec.n_embd)}


def ffn_shapes(spec, dense):
    """The shapes of a layer's feed-forward tensors, dense or experts."""
    n_embd = spec.n_embd

    def swiglu(suffix, n_ff, *experts):
        up, down = (*experts, n_ff, n_embd), (*experts, n_embd, n_ff)
        return {f"ffn_gate{suffix}.weight": up, f"ffn_up{suffix}.weight": up, f"ffn_down{suffix}.weight": down}

    if dense:
        return {"ffn_norm.weight": (n_embd,), **swiglu("", spec.n_ff)}
    return {"ffn_norm.weight": (n_embd,), "ffn_gate_inp.weight": (spec.n_expert, n_embd),
            **({"exp_probs_b.bias": (spec.n_expert,)} if spec.exp_probs_b else {}),
            **swiglu("_exps", spec.n_ff_exp, spec.n_expert),
            **(swiglu("_shexp", spec.n_ff_exp * spec.n_expert_shared) if spec.n_expert_shared else {})}


def tensor_shapes(spec):
    """Tensor name -> numpy shape, in the order of the file."""
    shapes = {"token_embd.weight": (spec.n_vocab, spec.n_embd), "output_norm.weight": (spec.n_embd,)}
    if not spec.tied_output:
        shapes["output.weight"] = (spec.n_vocab, spec.n_embd)
    full = spec.full_layers() + [spec.arch == "deepseek32"] * spec.nextn
    for layer, own_indexer in enumerate(full):
        block = attention_shapes(spec)
        if own_indexer or (spec.indexer_shared_tensors and layer < spec.n_layer):
            block |= indexer_shapes(spec)
        block |= ffn_shapes(spec, dense=layer < spec.n_layer_dense)
        if layer >= spec.n_layer:
            block |= {"nextn.eh_proj.weight": (spec.n_embd, 2 * spec.n_embd), "nextn.enorm.weight": (spec.n_embd,),
                      "nextn.hnorm.weight": (spec.n_embd,), "nextn.shared_head_norm.weight": (spec.n_embd,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def quantize(x, kind):
    """Float32 rows x [n, n_in] in the GGML type `kind`: uint8 [n, row bytes]."""
    return TYPES[kind.name](x)


def n_bytes(shape, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes


def distribution(spec, name, shape):
    """(mean, standard deviation) of a tensor's weights.

    Products have a variance near one; queries and logits have more.
    """
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name == "token_embd.weight" and not spec.tied_output:
        return 0.0, 1.0
    if name in ("token_embd.weight", "output.weight"):
        return 0.0, 4 * shape[-1]**-0.5
    sharper = ".attn_q" in name and "indexer" not in name and "attn_q_a" not in name
    return 0.0, (1 + sharper) * shape[-1]**-0.5


def tensor_rows(spec, name, shape, kind):
    """Yield a tensor's rows, quantized to the type `kind`.

    About AT_ONCE weights are made at a time.
    """
    rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
    mean, std = distribution(spec, name, shape)
    n_rows, n_in = prod(shape[:-1]), shape[-1]
    step = max(1, AT_ONCE // n_in)
    for start in range(0, n_rows, step):
        x = rng.standard_normal((min(step, n_rows - start), n_in), dtype=np.float32)
        x *= np.float32(std)
        x += np.float32(mean)
        yield quantize(x, kind)


@lru_cache
def train_tokenizer(n_tokens):
    """(tokens, merges) of a byte-level BPE with at most n_tokens tokens.

    It is trained on Python's own documentation.
    """
    from pydoc_data.topics import topics
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([topics[topic] for topic in sorted(topics)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def add_tokenizer(writer, spec, vocabulary):
    learned, merges = vocabulary
    tokens = [*FIRST_TOKENS, *learned, *LAST_TOKENS]
    types = [gguf.TokenType.CONTROL if token in (*FIRST_TOKENS, *LAST_TOKENS[:2]) else
             gguf.TokenType.USER_DEFINED if token in LAST_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    n_unused = spec.n_vocab - len(tokens)
    tokens += [f"<unused-{i}>" for i in range(n_unused)]
    types += [gguf.TokenType.UNUSED] * n_unused
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", spec.pre or PRE[spec.arch])
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in types])
    writer.add_array("tokenizer.ggml.merges", merges)
    for i, key in enumerate(("bos", "eos", "padding")):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_eos_token", False)
    writer.add_string("tokenizer.chat_template", spec.chat_template)


def model_keys(spec):
    """Key (without the architecture) -> value.

    An int is written as u32, a float as f32. None is left out.
    """
    groups = spec.n_expert_groups if spec.n_expert else 0
    keys = {
        "vocab_size": spec.n_vocab, "context_length": spec.n_ctx, "embedding_length": spec.n_embd,
        "block_count": spec.n_layer + spec.nextn, "nextn_predict_layers": spec.nextn or None,
        "feed_forward_length": spec.n_ff, "leading_dense_block_count": spec.n_layer_dense,
        "attention.head_count": spec.n_head, "attention.layer_norm_rms_epsilon": float(spec.rms_eps),
        "attention.q_lora_rank": spec.n_lora_q or None, "attention.kv_lora_rank": spec.n_lora_kv,
        "rope.dimension_count": spec.n_rot, "rope.freq_base": float(spec.freq_base),
        "expert_count": spec.n_expert or None, "expert_used_count": spec.n_expert_used if spec.n_expert else None,
        "expert_shared_count": spec.n_expert_shared, "expert_feed_forward_length": spec.n_ff_exp,
        "expert_group_count": groups or None, "expert_group_used_count": spec.n_group_used if groups else None,
        "expert_gating_func": GATING[spec.expert_gating_func] or None,
        "expert_weights_norm": spec.expert_weights_norm or None,
        "expert_weights_scale": float(spec.expert_weights_scale) or None,
    }
    n_key = spec.n_nope + spec.n_rot
    if spec.legacy_kv_b:
        keys |= {"attention.head_count_kv": spec.n_head,
                 "attention.key_length": n_key, "attention.value_length": spec.n_v}
    else:
        keys |= {"attention.head_count_kv": 1,
                 "attention.key_length_mla": n_key, "attention.value_length_mla": spec.n_v,
                 "attention.key_length": spec.n_lora_kv + spec.n_rot, "attention.value_length": spec.n_lora_kv}
    if spec.rope_scaling != "absent":
        keys |= {"rope.scaling.type": spec.rope_scaling, "rope.scaling.factor": float(spec.rope_factor),
                 "rope.scaling.original_context_length": spec.n_ctx_orig,
                 "rope.scaling.yarn_log_multiplier": float(spec.yarn_log_multiplier) or None,
                 **dict.fromkeys(("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"), float(spec.yarn_beta) or None)}
    if spec.arch != "deepseek2":
        keys |= {"attention.indexer.head_count": spec.indexer_n_head,
                 "attention.indexer.key_length": spec.indexer_head_size, "attention.indexer.top_k": spec.indexer_top_k,
                 "attention.indexer.types": spec.full_layers() if spec.indexer_types else None}
    return keys


def add_metadata(writer, spec, name, vocabulary):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}
    writer.add_string("general.name", name)
    writer.add_uint32("general.file_type", file_type(spec))
    writer.add_uint32("general.quantization_version", 2)
    for key, value in model_keys(spec).items():
        if value is not None:
            add[type(value)](f"{spec.arch}.{key}", value)
    add_tokenizer(writer, spec, vocabulary)


def make_model(path, spec=ModelSpec(), advance=lambda n: None):
    """Write the model of `spec`, and return the path of its first file.

    `advance(n)` is called after each n weights. With `spec.split_max_tensors` the files are named as llama-gguf-split names them,
    NAME-00001-of-0000n.gguf. Memory stays below some hundred MB whatever the size.
    """
    vocabulary = train_tokenizer(spec.n_vocab - len(FIRST_TOKENS) - len(LAST_TOKENS))

    def rows_of(name, shape, kind):
        for rows in tensor_rows(spec, name, shape, kind):
            yield rows
            advance(len(rows) * shape[-1])

    return write_model(path, spec, f"random {spec.arch}, seed {spec.seed}", vocabulary, rows_of)


def write_model(path, spec, name, vocabulary, rows_of):
    """Write a model with given weights, and return its first file's path.

    rows_of(name, shape, kind) yields a tensor's rows, quantized to the GGML type `kind`. vocabulary: (tokens, merges) of the byte-level
    BPE, without the markers.
    """
    writer = gguf.GGUFWriter(Path(path), spec.arch, split_max_tensors=spec.split_max_tensors)
    add_metadata(writer, spec, name, vocabulary)
    kinds = {}
    for name, shape in tensor_shapes(spec).items():
        kinds[name] = kind = tensor_type(spec, name, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file, tensors in zip(writer.fout, writer.tensors):
        writer.write_padding(file, file.tell())
        for name, info in tensors.items():
            for rows in rows_of(name, info.shape, kinds[name]):
                rows.tofile(file)
            writer.write_padding(file, info.nbytes)
    first = Path(writer.fout[0].name)
    writer.close()
    return first


def spec_options(command):
    """A click option for every field of ModelSpec except the template.

    The template comes from a file.
    """
    for f in reversed([f for f in fields(ModelSpec) if f.name != "chat_template"]):
        flag = "--" + f.name.replace("_", "-")
        flag = f"{flag}/--no-{flag[2:]}" if f.type is bool else flag
        text = f"{f.metadata['help']}  [{f.default}]"
        command = click.option(flag, f.name, type=f.type, default=None, help=text)(command)
    return command


@click.command(help=__doc__.split("\n")[0])
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="small", show_default=True,
              help="sizes to start from")
@click.option("--chat-template", type=click.File(encoding="utf-8"), help="file that holds a chat template")
@spec_options
def main(path, preset, chat_template, **options):
    from rich.console import Console
    from rich.progress import Progress

    given = {name: value for name, value in options.items() if value is not None}
    if given.get("mix") and "type" in given:
        raise click.UsageError("Give the types with --type or with --mix, not both.")
    try:
        spec = ModelSpec(**{**PRESETS[preset], **given, "chat_template": chat_template.read() if chat_template else ""})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    shapes = tensor_shapes(spec)
    n_weights = sum(map(prod, shapes.values()))
    with Progress(console=Console(stderr=True), transient=True, disable=n_weights < 1 << 25) as progress:
        task = progress.add_task("writing", total=n_weights)
        try:
            first = make_model(path, spec, lambda n: progress.advance(task, n))
        except OSError as error:
            raise click.ClickException(f"{path}: the model cannot be written ({error.strerror or error}).") from error
    size = sum(n_bytes(shape, tensor_type(spec, name, shape)) for name, shape in shapes.items())
    click.echo(f"{first}: {spec.arch} {spec.mix or spec.type}, {n_weights / 1e6:,.1f} M parameters, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
