"""The metadata of a model: config.json of Hugging Face -> keys of GGUF.

    shape = read_shape(config)              # a Shape: what the tensors must look like
    model_keys(config, shape, notes)        # {key: value}, all but those of the tokenizer

What a GGUF file cannot say, or its readers would take for something else, is refused here. So is a field that is missing where the classes
of transformers have different defaults.
"""
from dataclasses import dataclass

import numpy as np

from pydsa.conversion.fields import Fields
from pydsa.errors import UnsupportedModelError
from pydsa.gguf.file import quote

# HF's class -> GGUF's architecture
ARCHITECTURES = {"DeepseekV32ForCausalLM": "deepseek32", "GlmMoeDsaForCausalLM": "glm-dsa", "DeepseekV3ForCausalLM": "deepseek2",
                 "DeepseekV2ForCausalLM": "deepseek2"}
V2 = "DeepseekV2ForCausalLM"
GATING = {"softmax": 1, "sigmoid": 2}
LONG_CONTEXT = 1 << 20      # from here on readers take layers of glm-dsa for shared ones, where no key says which are


@dataclass(frozen=True)
class Shape:
    """What the tensors of a model depend on, with llama.cpp's names."""
    hf: str                 # the class of transformers
    arch: str
    n_layer: int
    n_nextn: int            # MTP blocks that the configuration declares
    n_vocab: int
    n_embd: int
    n_head: int
    q_lora: int             # 0: no low rank
    kv_lora: int
    n_nope: int
    n_rot: int
    n_v: int
    n_ff: int
    n_ff_exp: int
    n_lead: int             # leading layers without experts
    n_expert: int
    n_shared: int
    tied: bool
    interleaved: bool       # whether RoPE rotates neighbours
    index_heads: int        # 0: no indexer
    index_size: int
    index_interleaved: bool
    full: tuple             # for each layer: whether it has an indexer of its own


def read_shape(config):
    """The Shape of a model, from the Fields of its config.json.

    Raises CheckpointError for a value that is missing or wrong, UnsupportedModelError for a model that cannot be converted.
    """
    classes = config.strings("architectures")
    if len(classes) != 1 or classes[0] not in ARCHITECTURES:
        raise UnsupportedModelError(f"{config.path}: the architecture is {quote(', '.join(classes))}, expected one of "
                                    f"{', '.join(ARCHITECTURES)}.")
    arch, n_layer = ARCHITECTURES[classes[0]], config.integer("num_hidden_layers", 1, 512)
    _check_known(config)
    n_expert = config.integer("n_routed_experts", 0, 1024, default=0)
    n_head, indexed = config.integer("num_attention_heads", 1, 4096), arch != "deepseek2"
    return Shape(
        hf=classes[0], arch=arch, n_layer=n_layer, n_nextn=config.integer("num_nextn_predict_layers", 0, 16, default=0),
        n_vocab=config.integer("vocab_size", 1, 2**24), n_embd=config.integer("hidden_size", 1, 2**20), n_head=n_head,
        q_lora=config.integer("q_lora_rank", 1, 2**16, **({} if indexed else {"default": 0})),
        kv_lora=config.integer("kv_lora_rank", 1, 2**16), n_nope=config.integer("qk_nope_head_dim", 1, 2**14),
        n_rot=config.integer("qk_rope_head_dim", 2, 2**14), n_v=config.integer("v_head_dim", 1, 2**14),
        n_ff=config.integer("intermediate_size", 1, 2**24),
        n_ff_exp=config.integer("moe_intermediate_size", 1, 2**24, **({} if n_expert else {"default": 0})),
        n_lead=_leading_dense(config, n_layer, n_expert), n_expert=n_expert,
        n_shared=config.integer("n_shared_experts", 0, 1024, default=0), tied=config.boolean("tie_word_embeddings", default=False),
        interleaved=config.boolean("rope_interleave", default=True),
        index_heads=config.integer("index_n_heads", 1, 4096) if indexed else 0,
        index_size=config.integer("index_head_dim", 1, 2**14) if indexed else 0,
        index_interleaved=config.boolean("indexer_rope_interleave", default=arch == "glm-dsa"),
        full=_full_layers(config, n_layer) if arch == "glm-dsa" else (indexed,) * n_layer)


def _check_known(config):
    """Refuse values that GGUF's architectures have no key for."""
    for name, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}.items():
        if name in config and config.values[name] != wanted:
            raise UnsupportedModelError(f"{config.path}: {name} is {quote(str(config.values[name]))}, expected {wanted}: GGUF files of "
                                        "these models have no other.")
    heads = config.integer("num_attention_heads", 1, 4096)
    if config.integer("num_key_value_heads", 1, 4096, default=heads) != heads:
        config.fail("num_key_value_heads", f"{heads}, as many as num_attention_heads")


def _leading_dense(config, n_layer, n_expert):
    """The number of leading layers without experts."""
    lead = config.integer("first_k_dense_replace", 0, 2**20, default=0 if n_expert else n_layer)
    kinds = config.strings("mlp_layer_types", default=None)
    if kinds is not None:
        lead = sum(kind == "dense" for kind in kinds)
        if kinds != ["dense"] * lead + ["sparse"] * (n_layer - lead):
            config.fail("mlp_layer_types", f"{n_layer} values, dense ones and then sparse ones")
    if not n_expert and lead < n_layer:
        config.fail("n_routed_experts", f"experts for the layers from {lead} on")
    return min(lead, n_layer)


def _full_layers(config, n_layer):
    """For each layer of GLM, whether it has an indexer of its own."""
    names = {"full": True, "shared": False, "F": True, "S": False}
    kinds = config.strings("indexer_types", default=None)
    if kinds is None and "index_topk_pattern" in config:
        pattern = config.values["index_topk_pattern"]
        kinds = list(pattern) if isinstance(pattern, str) else config.strings("index_topk_pattern")
    if kinds is None:
        every, skip = config.integer("index_topk_freq", 1, 1024, default=1), config.integer("index_skip_topk_offset", 0, 1024, default=2)
        return tuple(max(il - skip + 1, 0) % every == 0 for il in range(n_layer))
    if len(kinds) != n_layer or not set(kinds) <= set(names) or not names[kinds[0]]:
        config.fail("indexer_types" if "indexer_types" in config else "index_topk_pattern",
                    f"full or shared for each of {n_layer} layers, and full for the first")
    return tuple(names[kind] for kind in kinds)


def model_keys(config, shape, notes):
    """The keys of a model, {key: value}, from its Fields and Shape.

    An int is to be written as u32, a float as f32. notes: a list to which sentences on what is unusual are added.
    """
    s = shape
    keys = {
        "vocab_size": s.n_vocab, "context_length": config.integer("max_position_embeddings", 1), "embedding_length": s.n_embd,
        "block_count": s.n_layer + s.n_nextn, "feed_forward_length": s.n_ff, "leading_dense_block_count": s.n_lead,
        "attention.head_count": s.n_head, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 0, 1),
        "attention.kv_lora_rank": s.kv_lora, "attention.key_length": s.kv_lora + s.n_rot, "attention.value_length": s.kv_lora,
        "attention.key_length_mla": s.n_nope + s.n_rot, "attention.value_length_mla": s.n_v, "rope.dimension_count": s.n_rot}
    if s.n_nextn:
        keys["nextn_predict_layers"] = s.n_nextn
    if s.q_lora:
        keys["attention.q_lora_rank"] = s.q_lora
    keys |= _rope_keys(config, s)
    keys |= _expert_keys(config, s, notes)
    if s.index_heads:
        keys |= {"attention.indexer.head_count": s.index_heads, "attention.indexer.key_length": s.index_size,
                 "attention.indexer.top_k": config.integer("index_topk", 1)}
    if s.arch == "glm-dsa" and (not all(s.full) or keys["context_length"] >= LONG_CONTEXT):
        keys["attention.indexer.types"] = np.array(s.full)
    return {f"{s.arch}.{key}": value for key, value in keys.items()}


def _expert_keys(config, s, notes):
    """The keys of the experts."""
    keys = {"expert_feed_forward_length": s.n_ff_exp or s.n_ff, "expert_shared_count": s.n_shared if s.n_expert else 0}
    if not s.n_expert:
        return keys
    v2 = s.hf == V2
    scoring = config.string("scoring_func", default="softmax" if v2 else "sigmoid", among=GATING)
    method = config.string("topk_method", default="greedy" if v2 else "noaux_tc", among=("greedy", "group_limited_greedy", "noaux_tc"))
    norm = config.boolean("norm_topk_prob", default=not v2)
    keys |= {"expert_count": s.n_expert, "expert_used_count": config.integer("num_experts_per_tok", 1, s.n_expert),
             "expert_gating_func": GATING[scoring],
             "expert_weights_scale": config.number("routed_scaling_factor", 0, 1e6, **({"default": 1.0} if v2 else {}))}
    if norm and v2:
        raise UnsupportedModelError(f"{config.path}: norm_topk_prob is true, expected false: programs differ in what V2 then does.")
    if norm:
        keys["expert_weights_norm"] = True
    if method != "greedy":
        groups, used = config.integer("n_group", 1, 1024), config.integer("topk_group", 1, 1024)
        keys |= {"expert_group_count": groups, "expert_group_used_count": used}
        if method == "group_limited_greedy" and groups > used:
            notes.append("The model chooses groups of experts by their best expert (topk_method group_limited_greedy); GGUF has no key for "
                         "it, and readers, llama.cpp and pydsa, choose them by the sum of the best two.")
    return keys


def _rope_keys(config, s):
    """The keys of rope.*; refused is what readers would scale otherwise."""
    rope = config.fields("rope_parameters", default=None) or config.fields("rope_scaling", default=Fields({}, config.path, "rope_scaling."))
    base = (rope if "rope_theta" in rope else config).number("rope_theta", 1.001, 1e15)
    keys = {"rope.freq_base": base}
    kind = rope.string("rope_type", default=rope.string("type", default="default"))
    if kind in ("default", "none"):
        return keys
    if rope.number("partial_rotary_factor", default=1.0) != 1:
        rope.fail("partial_rotary_factor", "1")
    factor = rope.number("factor", 1e-6, 1e6)
    keys |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return keys
    if kind != "yarn":
        raise UnsupportedModelError(f"{config.path}: the scaling of RoPE is {quote(kind)}, expected yarn, linear or default.")
    mscale, everywhere = rope.number("mscale", 0, 1e3, default=0.0), rope.number("mscale_all_dim", 0, 1e3, default=0.0)
    same = mscale == everywhere if s.arch == "deepseek2" else mscale == everywhere == 1
    if factor > 1 and (not everywhere or not same or rope.number("attention_factor", default=1.0) != 1):
        raise UnsupportedModelError(f"{config.path}: YaRN has mscale {mscale:g} and mscale_all_dim {everywhere:g}, expected "
                                    + ("the same number for both" if s.arch == "deepseek2" else "1 for both")
                                    + " and no attention_factor: readers of GGUF would scale attention otherwise.")
    if not rope.boolean("truncate", default=True):
        rope.fail("truncate", "true")
    original = rope.integer("original_max_position_embeddings", 1, default=config.integer("max_position_embeddings", 1))
    keys |= {"rope.scaling.original_context_length": original, "rope.scaling.yarn_log_multiplier": 0.1 * everywhere,
             "rope.scaling.yarn_beta_fast": rope.number("beta_fast", 1e-6, 1e6, default=32.0),
             "rope.scaling.yarn_beta_slow": rope.number("beta_slow", 1e-6, 1e6, default=1.0)}
    return keys
