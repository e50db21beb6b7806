"""deepseek2: multi-head latent attention and mixture of experts.

The models are DeepSeek V2, V2-Lite and V3. The models with sparse attention build on this file.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from pydsa.errors import GGUFError, UnsupportedModelError
from pydsa.executor.graph import CacheRef
from pydsa.models import stored
from pydsa.models.blocks import spans
from pydsa.models.stored import linear, scaled
from pydsa.models.yarn import Rope, rope_from_metadata

SOFTMAX, SIGMOID, SOFTMAX_WEIGHT = 1, 2, 3      # expert_gating_func
NEOX = False        # RoPE of the attention rotates pairs (2i, 2i + 1)


@dataclass(frozen=True)
class Config:
    """The checked hyperparameters of a file, with llama.cpp's names."""
    architecture: str
    name: str
    n_layer: int            # without MTP blocks
    n_layer_nextn: int      # MTP blocks, not used
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_head: int
    q_lora: int             # 0: queries are made directly from the residual stream
    kv_lora: int
    n_nope: int
    n_rot: int
    n_v: int
    n_ff: tuple             # one value a layer
    n_ff_exp: tuple         # one value a layer
    n_layer_dense_lead: int
    n_expert: int
    n_expert_used: int
    n_expert_shared: int
    n_group: int
    n_group_used: int
    gating: int
    expert_weights_norm: bool
    expert_weights_scale: float
    rms_eps: float
    rope: Rope = field(repr=False)

    VARIANTS = {"auto": ("mha", "dense"), "dense": ("mha", "dense")}       # --attention -> the variants that it may use (schedule.py)

    @property
    def top_k(self):
        """The number of keys that a token attends to; None without an indexer."""
        return None

    def with_top_k(self, top_k):
        """The Config with another top_k; None without an indexer."""
        return None

    @property
    def indexed_layers(self):
        """For each layer, the layer whose indexer it uses; None without one."""
        return None

    @property
    def kq_scale(self):
        """The factor of q . k before the softmax."""
        return self.rope.mscale ** 2 / math.sqrt(self.n_nope + self.n_rot)

    @property
    def cache_widths(self):
        """{CacheRef: the numbers of values of a cache row's parts}.

        Integer cache types have a scale for each part.
        """
        return {CacheRef("latents", il): (self.kv_lora, self.n_rot) for il in range(self.n_layer)}

    @classmethod
    def from_metadata(cls, metadata, n_vocab):
        """The Config of a file whose token_embd.weight has n_vocab rows.

        Raises GGUFError or UnsupportedModelError for keys that are not valid.
        """
        # GLM-4.7-Flash, whose first files lack expert_gating_func
        flash = metadata.integer("deepseek2.block_count", 1, 1024) in (47, 48) and n_vocab == 154880
        return cls(**read_metadata(metadata, n_vocab, default_gating=SIGMOID if flash else SOFTMAX))


def readers(metadata, arch, n_layer):
    """Two functions that read an architecture's keys.

    integer(key, low, high[, default, first]) reads a key, which may have a value for each layer if these are equal from layer `first` on.
    fail(text) raises a GGUFError that names the file.
    """
    def integer(key, low, high, first=0, **default):
        key = f"{arch}.{key}"
        if not isinstance(metadata.get(key), np.ndarray):
            return metadata.integer(key, low, high, **default)
        values = per_layer(metadata, key, n_layer, low, high)
        if len(set(values[first:])) == 1 and values[-1] >= low:
            return values[-1]
        found = ", ".join(f"{value} in layers {layers}" for value, layers in spans(values).items())
        raise UnsupportedModelError(f"{metadata.path}: {key} is {found}, expected one number for all layers"
                                    + (f" from {first} on." if first else "."))

    def fail(text):
        raise GGUFError(f"{metadata.path}: {text}.")

    return integer, fail


def read_metadata(metadata, n_vocab, default_gating):
    """The fields of Config as a dict.

    Raises GGUFError for a key that is missing, of the wrong type or impossible, UnsupportedModelError for one that pydsa cannot use.
    """
    arch = metadata.string("general.architecture")
    blocks = metadata.integer(f"{arch}.block_count", 1, 1024)
    nextn = metadata.integer(f"{arch}.nextn_predict_layers", 0, 1024, default=0)
    n_layer = blocks - nextn
    integer, fail = readers(metadata, arch, n_layer)
    if nextn >= blocks:
        fail(f"{arch}.nextn_predict_layers is {nextn}, expected less than the {blocks} blocks")
    n_ctx_train = metadata.integer(f"{arch}.context_length", 1, 2**31 - 1)
    if metadata.number(f"{arch}.attention.temperature_scale", default=0.0) != 0:
        raise UnsupportedModelError(f"{metadata.path}: {arch}.attention.temperature_scale is set, expected 0: temperature tuning "
                                    "is not supported.")
    kv_lora = integer("attention.kv_lora_rank", 1, 2**16)
    n_rot = integer("rope.dimension_count", 2, 2**14)
    key_length, n_v = read_head_sizes(metadata, arch, integer, fail, kv_lora, n_rot)
    return dict(
        architecture=arch, name="".join(filter(str.isprintable, metadata.string("general.name", default=arch)))[:200],
        n_layer=n_layer, n_layer_nextn=nextn, n_ctx_train=n_ctx_train, n_vocab=n_vocab,
        n_embd=metadata.integer(f"{arch}.embedding_length", 1, 2**20), n_head=integer("attention.head_count", 1, 4096),
        q_lora=integer("attention.q_lora_rank", 0, 2**16, default=0), kv_lora=kv_lora, n_nope=key_length - n_rot, n_rot=n_rot, n_v=n_v,
        n_ff=per_layer(metadata, f"{arch}.feed_forward_length", n_layer, 1, 2**24),
        rms_eps=metadata.number(f"{arch}.attention.layer_norm_rms_epsilon", low=0, high=1),
        rope=rope_from_metadata(metadata, arch, n_rot, n_ctx_train), **read_experts(metadata, arch, n_layer, default_gating))


def read_head_sizes(metadata, arch, integer, fail, kv_lora, n_rot):
    """The sizes of a head's key and of its value.

    Files of 2024 have them as key_length and value_length, later ones as key_length_mla and value_length_mla, beside those of the latent.
    """
    latent = {"key_length": kv_lora + n_rot, "value_length": kv_lora}
    old = not any(f"{arch}.attention.{name}_mla" in metadata for name in latent)
    given = {name: integer(f"attention.{name}", 1, 2**17, default=None if old else size) for name, size in latent.items()}
    if old and (given == latent or None in given.values()):
        fail(f"{arch}.attention.key_length_mla and value_length_mla are missing, expected the sizes of a head's key and value")
    suffix = "" if old else "_mla"
    key_length, n_v = (integer(f"attention.{name}{suffix}", 1, 2**14) for name in latent)
    if n_rot % 2 or n_rot >= key_length:
        fail(f"{arch}.rope.dimension_count is {n_rot}, expected an even number less than key_length{suffix}, {key_length}")
    for name, size in latent.items():
        if not old and given[name] != size:
            fail(f"{arch}.attention.{name} is {given[name]}, expected {size} with a latent of rank {kv_lora}")
    return key_length, n_v


def read_experts(metadata, arch, n_layer, default_gating):
    """The fields of Config for the experts, as a dict."""
    read, fail = readers(metadata, arch, n_layer)
    lead = metadata.integer(f"{arch}.leading_dense_block_count", 0, 1024, default=0)

    def integer(key, low, high, **default):
        return read(key, low, high, first=min(lead, n_layer - 1), **default)

    n_expert, used = integer("expert_count", 0, 1024, default=0), integer("expert_used_count", 0, 1024, default=0)
    groups, groups_used = integer("expert_group_count", 0, 1024, default=0), integer("expert_group_used_count", 0, 1024, default=0)
    if n_expert == 0 and lead < n_layer:
        fail(f"{arch}.expert_count is 0, but layers {lead} to {n_layer - 1} have experts")
    if not (0 < used <= n_expert or n_expert == used == 0):
        fail(f"{arch}.expert_used_count is {used}, expected 1 to {n_expert}, as there are {n_expert} experts")
    if groups > 1:
        if n_expert % groups or n_expert == 0:
            fail(f"{n_expert} experts cannot be divided into {groups} groups ({arch}.expert_group_count)")
        if not 0 < groups_used <= groups:
            fail(f"{arch}.expert_group_used_count is {groups_used}, expected 1 to {groups}, as there are {groups} groups")
        if used > groups_used * (n_expert // groups):
            fail(f"{arch}.expert_used_count is {used}, but {groups_used} groups hold only {groups_used * (n_expert // groups)} experts")
    default = {} if default_gating is None else {"default": default_gating}
    gating = integer("expert_gating_func", 0, 100, **default) if n_expert else SOFTMAX
    if gating not in (SOFTMAX, SIGMOID, SOFTMAX_WEIGHT):
        raise UnsupportedModelError(f"{metadata.path}: {arch}.expert_gating_func is {gating}, expected 1 (softmax), 2 (sigmoid) or "
                                    "3 (softmax of the chosen).")
    n_ff_exp = per_layer(metadata, f"{arch}.expert_feed_forward_length", n_layer, 1, 2**24) if n_expert else (0,) * n_layer
    return dict(
        n_layer_dense_lead=lead, n_expert=n_expert, n_expert_used=used,
        n_expert_shared=integer("expert_shared_count", 0, 1024) if n_expert else 0,
        n_group=max(1, groups), n_group_used=max(1, groups_used), gating=gating, n_ff_exp=n_ff_exp,
        expert_weights_norm=metadata.boolean(f"{arch}.expert_weights_norm", default=False),
        expert_weights_scale=metadata.number(f"{arch}.expert_weights_scale", low=0, high=1e6, default=0.0) or 1.0)


def per_layer(metadata, key, n_layer, low, high):
    """The value of a key for each layer, a tuple of n_layer int.

    The key is one integer for all layers, or an array with one value a layer, which may go on with those of MTP blocks. A layer that does
    not use the value may have 0.
    """
    if not isinstance(metadata.get(key), np.ndarray):
        return (metadata.integer(key, low, high),) * n_layer
    values = metadata.integers(key)[:n_layer]
    if len(values) < n_layer or min(values) < 0 or max(values) > high:
        raise GGUFError(f"{metadata.path}: {key} is {values.tolist()}, expected {n_layer} values from 0 to {high}.")
    return tuple(values.tolist())


def build(graph, config, weights, variant, layers):
    """Record the forward pass of layers in the form of a schedule.Variant."""
    decoder(graph, config, weights, variant, layers, lambda il, h, qr, table, rows: None)


def decoder(g, c, weights, variant, layers, select):
    """Record a whole model, or the layers of a stage, a range.

    Its ends are hidden rows where it does not begin with the first layer, or end with the last. No layers, behind the last: the head alone.

    select(il, h, qr, table, rows) records the choice of a layer's keys. It returns their indices, a mask made of them, or None for all
    keys. rows(x) are the rows of a value that the layer goes on with once its caches are written; qr has these only.
    """
    if layers.start == 0:
        x = scaled(g, g.get_rows("inp_embd", weights("token_embd.weight", c.n_vocab, c.n_embd)), weights, "token_embd")
    else:
        x = g.hidden("inp_hidden", c.n_embd)
    table = g.rope_table("rope_table", c.rope.freqs, c.rope.magnitude) if layers else None
    for il in layers:
        w = weights.layer(il)
        h = g.rms_norm(f"attn_norm-{il}", x, w("attn_norm.weight", c.n_embd), c.rms_eps)
        rows = g.last_rows if variant.ends_early and il == c.n_layer - 1 else lambda x: x
        x = g.add(f"ffn_inp-{il}", latent_attention(g, c, w, il, h, table, variant, select, rows), rows(x))
        h = g.rms_norm(f"ffn_norm-{il}", x, w("ffn_norm.weight", c.n_embd), c.rms_eps)
        if il < c.n_layer_dense_lead:
            out = feed_forward(g, w, il, h, "", c.n_ff[il], c.n_embd)
        else:
            out = experts(g, c, w, il, h)
        x = g.add(f"l_out-{il}", out, x)
    if layers.stop < c.n_layer:
        g.output = x
        return
    x = g.last_rows(x)
    if not variant.head:
        g.output = x
        return
    x = g.rms_norm("result_norm", x, weights("output_norm.weight", c.n_embd), c.rms_eps)
    head = "output" if weights.has("output.weight") else "token_embd"
    g.output = linear(g, weights, "result_output", head, x, c.n_vocab, c.n_embd)


def latent_attention(g, c, w, il, h, table, variant, select, rows):
    """Record multi-head latent attention (MLA) for the rows(h).

    A token's cache row serves all heads: a latent, and the rotated part of its key. Keys are those of all rows.
    """
    qr = rows(h)
    if c.q_lora:
        q = linear(g, w, f"q_a-{il}", "attn_q_a", qr, c.q_lora, c.n_embd)
        qr = g.rms_norm(f"qr-{il}", q, w("attn_q_a_norm.weight", c.q_lora), c.rms_eps)
    kv_pe = linear(g, w, f"kv_cmpr_pe-{il}", "attn_kv_a_mqa", h, c.kv_lora + c.n_rot, c.n_embd)
    g.rms_norm(f"kv_cmpr-{il}", kv_pe.slice(0, c.kv_lora), w("attn_kv_a_norm.weight", c.kv_lora), c.rms_eps, into=kv_pe.slice(0, c.kv_lora))
    g.rope(kv_pe.reshape(1, c.kv_lora + c.n_rot).slice(c.kv_lora, c.kv_lora + c.n_rot), table, NEOX)
    g.cache_write(CacheRef("latents", il), kv_pe)
    choice = select(il, h, qr, table, rows)
    table = rows(table)

    name, width = ("attn_q_b", c.q_lora) if c.q_lora else ("attn_q", c.n_embd)
    q = linear(g, w, f"q-{il}", name, qr, c.n_head * (c.n_nope + c.n_rot), width).reshape(c.n_head, c.n_nope + c.n_rot)
    k_b, v_b = stored.key_and_value_heads(w, c.n_head, c.kv_lora, c.n_nope, c.n_v)
    scaled(g, q.slice(0, c.n_nope), w, "attn_k_b", "attn_kv_b")     # as well as the keys
    attention = plain_attention if variant.plain and q.rows == "tokens" else absorbed_attention
    out = scaled(g, attention(g, c, il, q, table, k_b, v_b, variant, choice), w, "attn_v_b", "attn_kv_b")
    return linear(g, w, f"attn_out-{il}", "attn_output", out.reshape(c.n_head * c.n_v), c.n_embd, c.n_head * c.n_v)


def plain_attention(g, c, il, q, table, k_b, v_b, variant, choice):
    """Record MLA's plain form: each head has keys and values of its own.

    They are made from the latents.
    """
    name, latents = f"kqv_out-{il}", CacheRef("latents", il)
    g.rope(q.slice(c.n_nope, c.n_nope + c.n_rot), table, NEOX)
    if choice is None:
        return g.mha_attention(name, q, latents, k_b, v_b, c.kq_scale)
    return g.mha_sparse_attention(name, q, latents, choice, k_b, v_b, c.kq_scale)


def absorbed_attention(g, c, il, q, table, k_b, v_b, variant, choice):
    """Record MLA's absorbed form: queries are projected to latent space.

    The latents are then both keys and values.
    """
    name, latents = f"kqv-{il}", CacheRef("latents", il)
    q_latent = g.value(f"q_nope_absorbed-{il}", c.n_head, c.kv_lora + c.n_rot, like=q)
    g.head_linear(None, k_b, q.slice(0, c.n_nope), into=q_latent.slice(0, c.kv_lora))
    g.rope(q.slice(c.n_nope, c.n_nope + c.n_rot), table, NEOX, into=q_latent.slice(c.kv_lora, c.kv_lora + c.n_rot))
    if choice is None:
        mixed = g.dense_attention(name, q_latent, latents, c.kv_lora, c.kq_scale)
    elif variant.indexer == "mask":
        mixed = g.masked_attention(name, q_latent, latents, choice, c.kv_lora, c.kq_scale)
    else:
        mixed = g.sparse_attention(name, q_latent, latents, choice, c.kv_lora, c.kq_scale)
    return g.head_linear(f"kqv_out-{il}", v_b, mixed)


def feed_forward(g, w, il, h, kind, n_ff, n_embd):
    """Record SwiGLU, down(silu(gate h) * up h).

    kind: "" for a dense layer, "_shexp" for the shared expert.
    """
    gate, up = (linear(g, w, f"ffn_{part}{kind}-{il}", f"ffn_{part}{kind}", h, n_ff, n_embd) for part in ("gate", "up"))
    hidden = g.silu_mul(f"ffn_swiglu{kind}-{il}", gate, up)
    return linear(g, w, f"ffn_out{kind}-{il}", f"ffn_down{kind}", hidden, n_embd, n_ff)


def experts(g, c, w, il, h):
    """Record the mixture of experts.

    The outputs of the chosen experts are weighted and added, with that of the shared expert, if there is one.
    """
    if w.has("exp_probs_b.bias"):
        bias = w("exp_probs_b.bias", c.n_expert)
    else:
        bias = np.zeros(c.n_expert, np.float32)
        bias.flags.writeable = False
    logits = linear(g, w, f"ffn_moe_logits-{il}", "ffn_gate_inp", h, c.n_expert, c.n_embd)
    ids, weights = g.moe_route((f"ffn_moe_topk-{il}", f"ffn_moe_weights-{il}"), logits, c.n_expert_used, bias, c.gating,
                               c.n_group, c.n_group_used, c.expert_weights_norm, c.expert_weights_scale)
    n_ff = c.n_ff_exp[il]
    out = stored.experts(g, w, il, h, ids, weights, c.n_expert, n_ff)
    if c.n_expert_shared:
        shared = feed_forward(g, w, il, h, "_shexp", n_ff * c.n_expert_shared, c.n_embd)
        out = g.add(f"ffn_out-{il}", out, shared)
    return out
