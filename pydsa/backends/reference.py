"""Every op in plain numpy: the specification of the other backends.

From pydsa it imports only the arrays of host.py. Each op writes its result into `out`, its first argument, and returns nothing. T is the
number of tokens, H of heads, S of cache rows, E of experts; D is a head's width. Values are float64 (float32 on other backends). Weights
are dequantized arrays. Cache rows have the same storage type as on every backend.
"""
import numpy as np

from pydsa.backends import host
from pydsa.backends.host import cache_values as _floats
from pydsa.backends.host import empty, fetch, form_costs, free_bytes, measure_bus, recorded, store, timed, upload  # noqa: F401

FLOAT = np.float64
PICKS = 0       # the most tokens that the device can sample from; 0: the host samples
WEIGHTS_FIRST = True        # weights are read before kernels are compiled
KV_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}   # bf16: the upper half of a float32


def weight(tensor):
    """A GGUF tensor dequantized by gguf-py, float32 of the tensor's shape."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    if tensor.type == "Q1_0":
        return _dequantize_q1_0(tensor.data).reshape(tensor.shape)
    return dequantize(tensor.data, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def _dequantize_q1_0(data):
    """Dequantize rows of Q1_0, which gguf-py does not: d where a bit is set, else -d.

    A block is a float16 d and 128 bits.
    """
    blocks = data.reshape(-1, 18)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return np.where(np.unpackbits(blocks[:, 2:], axis=1, bitorder="little"), d, -d).reshape(*data.shape[:-1], -1)


class Slot(host.Slot):
    """Memory that holds one weight at a time, float32."""

    def __init__(self, n_bytes):
        super().__init__(n_bytes, weight)


def cache_rows(n_ctx, widths, storage):
    """A cache of n_ctx rows of zeros.

    "i8" and "i16" rows have all high bytes, then for "i16" all low bytes, part by part, and a float32 scale for each part.
    """
    if storage in KV_DTYPES:
        return np.zeros((n_ctx, sum(widths)), KV_DTYPES[storage])
    planes = ["high", "low"][:1 if storage == "i8" else 2]
    fields = [(f"{plane}{i}", "i1", width) for plane in planes for i, width in enumerate(widths)]
    return np.zeros((n_ctx, 1), np.dtype([*fields, ("d", "<f4", len(widths))]))


def cache_bytes(rows):
    """A view of the cache as bytes, uint8 [n_ctx, row_bytes].

    The bytes are the same on every backend.
    """
    return rows.view(np.uint8)


def compile_calls(bind, progress=None):
    """Do nothing: numpy compiles nothing."""


def check_threads(n):
    """None for any n: numpy chooses its own threads."""


def set_threads(n):
    """Do nothing: numpy chooses its own threads."""


_nan_met = False


def _mark_nan(values):
    """Mark NaN and infinity, which a choice of keys or experts would hide."""
    global _nan_met
    _nan_met = _nan_met or not (values < np.inf).all()


def nan_met():
    """Whether a choice met NaN or infinity since the last call."""
    global _nan_met
    met, _nan_met = _nan_met, False
    return met


def measure_ceilings(n_threads):
    """None: numpy's speed is not a limit of the machine."""


def get_rows(out, w, ids):      # [T, n], [n_rows, n], [T]
    """Rows of a table: out[t] = w[ids[t]]."""
    out[...] = w[ids]


def rms_norm(out, x, w, eps):       # [T, n], [T, n], [n]
    """Root mean square norm: out = w x / sqrt(mean(x^2) + eps)."""
    out[...] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def layer_norm(out, x, w, b, eps):      # [T, n], [T, n], [n], [n]
    """Layer norm: out = w (x - mean) / sqrt(var + eps) + b."""
    centred = x - x.mean(axis=-1, keepdims=True)
    out[...] = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * w + b


def linear(out, w, x):      # [T, n_out], [n_out, n_in], [T, n_in]
    """Matrix product: out = x w^T."""
    out[...] = x @ w.T


def head_linear(out, w, x):     # [T, H, n_out], [H, n_out, n_in], [T, H, n_in]
    """Matrix product for each head: out[t, h] = w[h] x[t, h]."""
    out[...] = np.einsum("thi,hoi->tho", x, w)


def rope_table(out, positions, freqs, magnitude):       # [T, 2, n_rot/2], [T], [n_rot/2]
    """Cosines and sines of position * frequency, times YaRN's magnitude."""
    angles = positions[:, None].astype(np.float64) * freqs
    out[:, 0], out[:, 1] = np.cos(angles) * magnitude, np.sin(angles) * magnitude


def rope(out, x, table, neox):      # [T, H, n_rot], [T, H, n_rot], [T, 2, n_rot/2]
    """Rotary position embedding of pairs of values.

    The pairs are (i, i + n_rot/2) if neox ("neox"), else (2i, 2i + 1) ("norm"). out may be x itself.
    """
    cos, sin = table[:, 0][:, None, :], table[:, 1][:, None, :]
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if neox else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first].copy(), x[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos


def hadamard(out, x):       # [T, H, D] with D a power of two; out may be x itself
    """The Walsh-Hadamard rotation of the last axis.

    It is orthonormal, H H = I, and in Sylvester order.
    """
    y, width = x.copy(), x.shape[-1]
    step = 1
    while step < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(x.shape)
        step *= 2
    out[...] = y / np.sqrt(width)


def cache_write(cache, x, positions):       # [S, n], [T, n], [T]
    """Write rows to a cache: cache[positions[t]] = x[t].

    Values are converted to the cache's type. Integer types have a scale for each part, with which its largest magnitude becomes 127 (i8) or
    127 * 256 (i16).
    """
    if cache.dtype.names:
        start = 0
        for i in range(cache.dtype["d"].shape[0]):
            width = cache.dtype[f"high{i}"].shape[0]
            _write_part(cache, i, np.ascontiguousarray(x[:, start:start + width], np.float32), positions)
            start += width
    elif cache.dtype == np.uint16:
        bits = x.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        cache[positions] = np.where(np.isnan(x), (bits >> 16) | 64, rounded)
    else:
        with np.errstate(over="ignore"):
            cache[positions] = x.astype(np.float32).astype(cache.dtype)


def _write_part(cache, i, x, positions):    # int8 rounds halves away from zero, as Q8_0 does; int16 to even
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        top, wide = np.abs(x).max(axis=-1, initial=0), f"low{i}" in cache.dtype.names
        scale = top / np.float32(127 * 256 if wide else 127)        # not finite if a value is not
        factor = np.float32(127 * 256) / top if wide else 1 / scale
        products = np.where(((top if wide else scale) > 1e-30) & np.isfinite(scale), factor, 0)[:, None] * x
        integers = np.rint(products) if wide else np.copysign(np.floor(np.abs(products) + np.float32(0.5)), products)
        integers = np.where(np.isfinite(scale)[:, None], integers, 0).astype(np.int32)
    cache["d"][positions, 0, i] = scale
    cache[f"high{i}"][positions, 0] = (integers + 128) >> 8 if wide else integers
    if wide:
        cache[f"low{i}"][positions, 0] = integers.astype(np.int8)


def indexer_scores(out, q, w, keys, positions, scale):      # [T, S], [T, H, D], [T, H], [S, D], [T]
    """The scores of the lightning indexer (DeepSeek-V3.2-Exp).

    out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[t], else -inf
    """
    n_kv = positions[-1] + 1
    dots = np.maximum(np.einsum("thd,sd->ths", q, _floats(keys[:n_kv])), 0)
    out[...] = -np.inf
    out[:, :n_kv] = scale * np.einsum("th,ths->ts", w, dots)
    out[np.arange(out.shape[1]) > positions[:, None]] = -np.inf


def top_k(out, scores):     # int32 [T, k], [T, S]
    """The indices of the k greatest scores, in ascending order.

    Of equal scores the lowest indices are chosen; -inf and NaN never are. -1 pads the rest. NaN and infinity are marked (nan_met).
    """
    _mark_nan(scores)
    out[...] = -1
    for chosen, row in zip(out, scores):
        valid = np.flatnonzero(row > -np.inf)
        best = valid[np.argsort(-row[valid], kind="stable")[:out.shape[1]]]
        chosen[:best.size] = np.sort(best)


def indexer_select(out, q, w, keys, positions, scale):      # int32 [T, k], then as indexer_scores
    """indexer_scores and top_k in one op."""
    scores = np.empty((q.shape[0], positions[-1] + 1))
    indexer_scores(scores, q, w, keys, positions, scale)
    top_k(out, scores)


def scatter_mask(out, indices, positions):      # [T, S], int32 [T, k], [T]
    """A mask: 0 at the indices up to the token's position, -inf elsewhere."""
    out[...] = -np.inf
    for row, chosen, position in zip(out, indices, positions):
        row[chosen[(chosen >= 0) & (chosen <= position)]] = 0


def _attend(q, latents, bias, n_v, scale):      # [H, D], [S, D], [S] -> [H, n_v]; zeros without any key
    logits = scale * (q @ latents.T) + bias
    row_max = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(logits - np.where(row_max > -np.inf, row_max, 0))
    row_sum = p.sum(axis=-1, keepdims=True)
    return (p / np.where(row_sum > 0, row_sum, 1)) @ latents[:, :n_v]


def dense_attention(out, q, latents, positions, scale):     # [T, H, n_v], [T, H, D], [S, D], [T]
    """Absorbed MLA attention to all keys s <= positions[t].

    A key's first n_v values are its value (DeepSeek-V2, section 2.1).
    """
    rows = _floats(latents[:positions[-1] + 1])
    for t, position in enumerate(positions):
        out[t] = _attend(q[t], rows[:position + 1], 0, out.shape[-1], scale)


def masked_attention(out, q, latents, mask, positions, scale):      # mask [T, S]
    """dense_attention with an additive mask."""
    rows = _floats(latents[:positions[-1] + 1])
    for t, position in enumerate(positions):
        out[t] = _attend(q[t], rows[:position + 1], mask[t, :position + 1], out.shape[-1], scale)


def sparse_attention(out, q, latents, indices, scale):      # indices int32 [T, k], -1 pads
    """Absorbed MLA attention to the chosen keys only."""
    for t, chosen in enumerate(indices):
        out[t] = _attend(q[t], _floats(latents[chosen[chosen >= 0]]), 0, out.shape[-1], scale)


def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    # [T, H, n_v], [T, H, n_nope + n_rot], [S, D], [H, kv_lora, n_nope], [H, n_v, kv_lora], [T]
    """MLA in its plain form: each head has keys and values of its own.

    They are made from the latents (DeepSeek-V2, section 2.1).
    """
    chosen = np.arange(positions[-1] + 1)
    mha_sparse_attention(out, q, latents, np.where(chosen <= positions[:, None], chosen, -1), k_b, v_b, positions, scale)


def mha_sparse_attention(out, q, latents, indices, k_b, v_b, positions, scale):     # indices int32 [T, k], -1 pads
    """mha_attention to the chosen keys only.

    The output of a token without any key is zeros.
    """
    rows, kv_lora = _floats(latents[:positions[-1] + 1]), k_b.shape[1]
    for h in range(q.shape[1]):
        keys = np.concatenate([rows[:, :kv_lora] @ k_b[h], rows[:, kv_lora:]], axis=1)
        values = rows[:, :kv_lora] @ v_b[h].T
        for t, chosen in enumerate(indices):
            logits = scale * (keys[chosen[chosen >= 0]] @ q[t, h])
            p = np.exp(logits - logits.max(initial=-np.inf))
            out[t, h] = p @ values[chosen[chosen >= 0]] / p.sum() if p.size else 0


def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):      # int32 [T, used], [T, used], [T, E], [E]
    """The experts of each token and their weights.

    The expert with the greatest biased score is first (DeepSeek-V3, section 2.1.2). gating: 1 softmax, 2 sigmoid, 3 softmax over the chosen
    experts. The score of a group is the sum of its two greatest; n_group 1: no groups. NaN and infinities are marked (nan_met).
    """
    if gating == 2:
        with np.errstate(over="ignore"):
            p = 1 / (1 + np.exp(-logits))
    elif gating == 1:
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
    else:
        p = logits.astype(FLOAT)
    s = p + bias
    _mark_nan(np.abs(logits) + np.abs(s))
    if n_group > 1:
        groups = s.reshape(len(s), n_group, -1)
        group_score = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        dropped = np.argsort(-group_score, axis=-1, kind="stable")[:, n_group_used:]
        np.put_along_axis(groups, dropped[..., None], -np.inf, axis=1)
    ids[...] = np.argsort(-s, axis=-1, kind="stable")[:, :ids.shape[1]]
    chosen = np.take_along_axis(p, ids, axis=-1)
    if gating == 3:
        chosen = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
        chosen /= chosen.sum(axis=-1, keepdims=True)
    if norm:
        chosen = chosen / np.maximum(chosen.sum(axis=-1, keepdims=True), 6.103515625e-5)
    weights[...] = chosen * scale


def moe_gate_up(out, x, ids, gate, up):     # [T, used, f], [T, n], [T, used], [E, f, n], [E, f, n]
    """The hidden values of the chosen experts.

    out[t, i] = silu(gate_e x[t]) * up_e x[t] with e = ids[t, i]
    """
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        hidden = np.empty((token.size, gate.shape[1]), out.dtype)
        silu_mul(hidden, x[token] @ gate[expert].T, x[token] @ up[expert].T)
        out[token, slot] = hidden


def moe_linear(out, x, ids, w):     # [T, used, f], [T, n], [T, used], [E, f, n]
    """The products of the chosen experts: out[t, i] = w_e x[t] with e = ids[t, i]."""
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        out[token, slot] = x[token] @ w[expert].T


def expert_scale(out, x, ids, factors):     # [T, used, n], [T, used, n], [T, used], [E]; out may be x itself
    """Each expert's factor: out[t, i] = factors[ids[t, i]] x[t, i]."""
    out[...] = x * factors[ids][..., None]


def moe_down(out, hidden, ids, weights, down):      # [T, n], [T, used, f], [T, used], [T, used], [E, n, f]
    """The weighted sum of the chosen experts' outputs.

    out[t] = sum_i weights[t, i] down_e hidden[t, i] with e = ids[t, i]
    """
    out[...] = 0
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        out[token] += weights[token, slot, None] * (hidden[token, slot] @ down[expert].T)


def silu_mul(out, gate, up):        # [T, n] each
    """The gate of SwiGLU: out = gate sigmoid(gate) up."""
    with np.errstate(over="ignore"):
        out[...] = gate / (1 + np.exp(-gate)) * up


def scale(out, x, factor):      # [T, H, n] each; out may be x itself
    """One factor for all: out = factor x."""
    out[...] = x * factor


def add(out, x, y):     # [T, n] each
    """Sum: out = x + y."""
    out[...] = x + y
