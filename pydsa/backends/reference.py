"""Every op in plain numpy: the specification that the other backends are compared with. Of ours it imports only how arrays are made.

Each op writes its result into `out`, its first argument, and returns nothing. T is n_tokens; H heads; D a head's width; S cache rows.
Values are float64 here (float32 elsewhere), weights dequantized arrays; cache rows have the storage type that they have on any backend.
"""
import numpy as np

from pydsa.backends.host import empty, fetch, free_bytes, recorded, store, timed, upload  # noqa: F401

FLOAT = np.float64
PICKS = 0       # logits are the host's, which picks from them
WEIGHTS_FIRST = True        # before anything is compiled
KV_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}   # bf16: the upper half of a float32


def weight(tensor):
    """A GGUF tensor as its ops take it here: dequantized by gguf-py to float32 of the tensor's shape."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    return dequantize(tensor.data, GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def cache_rows(n_ctx, widths, storage):
    """An empty cache of n_ctx rows. "i8" and "i16": all high bytes, all low ones, part by part, and a float32 scale for each part."""
    if storage in KV_DTYPES:
        return np.zeros((n_ctx, sum(widths)), KV_DTYPES[storage])
    planes = ["high", "low"][:1 if storage == "i8" else 2]
    fields = [(f"{plane}{i}", "i1", width) for plane in planes for i, width in enumerate(widths)]
    return np.zeros((n_ctx, 1), np.dtype([*fields, ("d", "<f4", len(widths))]))


def cache_bytes(rows):
    """The cache's storage as bytes [n_ctx, row_bytes], a view: the same on every backend."""
    return rows.view(np.uint8)


def compile_calls(bind, progress=None):
    """Nothing to compile."""


def entry_point(function, args):
    """The function itself."""
    return function


def check_threads(n):
    """numpy chooses its threads itself: None, whatever is asked for."""


def set_threads(n):
    """Nothing to set."""


def measure_ceilings():
    """None: how fast numpy is here says nothing of the machine."""


def _floats(rows):      # cache rows of any storage -> float64
    if rows.dtype.names:
        def whole(i):
            high = rows[f"high{i}"][:, 0].astype(FLOAT)
            return 256 * high + rows[f"low{i}"][:, 0] if f"low{i}" in rows.dtype.names else high
        scales = rows["d"][:, 0].astype(FLOAT)
        return np.concatenate([whole(i) * scales[:, i:i + 1] for i in range(scales.shape[1])], axis=1)
    if rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(FLOAT)


def get_rows(out, w, ids):      # [T, n], [n_rows, n], [T]
    """out[t] = w[ids[t]]"""
    out[...] = w[ids]


def rms_norm(out, x, w, eps):       # [T, n], [T, n], [n]
    """out = w x / sqrt(mean(x^2) + eps)"""
    out[...] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def layer_norm(out, x, w, b, eps):      # [T, n], [T, n], [n], [n]
    """out = w (x - mean) / sqrt(var + eps) + b"""
    centred = x - x.mean(axis=-1, keepdims=True)
    out[...] = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * w + b


def linear(out, w, x):      # [T, n_out], [n_out, n_in], [T, n_in]
    """out = x w^T"""
    out[...] = x @ w.T


def head_linear(out, w, x):     # [T, H, n_out], [H, n_out, n_in], [T, H, n_in]
    """One matrix per head: out[t, h] = w[h] x[t, h]"""
    out[...] = np.einsum("thi,hoi->tho", x, w)


def rope_table(out, positions, freqs, magnitude):       # [T, 2, n_rot/2], [T], [n_rot/2]
    """Cosines and sines of position * frequency, times YaRN's magnitude."""
    angles = positions[:, None].astype(np.float64) * freqs
    out[:, 0], out[:, 1] = np.cos(angles) * magnitude, np.sin(angles) * magnitude


def rope(out, x, table, neox):      # [T, H, n_rot], [T, H, n_rot], [T, 2, n_rot/2]
    """Rotate pairs: (2i, 2i+1), "norm", or (i, i + n_rot/2), "neox". out may be x itself."""
    cos, sin = table[:, 0][:, None, :], table[:, 1][:, None, :]
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if neox else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first].copy(), x[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos


def hadamard(out, x):       # [T, H, D] with D a power of two; out may be x itself
    """The orthonormal Walsh-Hadamard rotation of the last axis (Sylvester order), H H = I."""
    y, width = x.copy(), x.shape[-1]
    step = 1
    while step < width:
        pairs = y.reshape(*x.shape[:-1], width // (2 * step), 2, step)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(x.shape)
        step *= 2
    out[...] = y / np.sqrt(width)


def cache_write(cache, x, positions):       # [S, n], [T, n], [T]
    """cache[positions[t]] = x[t], converted to the cache's type: with a scale for a part, the largest becomes 127 or 127 * 256"""
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


def _write_part(cache, i, x, positions):    # int8: halves away from zero, as Q8_0 has them; 16 bits: halves to even
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        top, wide = np.abs(x).max(axis=-1, initial=0), f"low{i}" in cache.dtype.names
        scale = top / np.float32(127 * 256 if wide else 127)        # not finite if a number is not
        factor = np.float32(127 * 256) / top if wide else 1 / scale
        products = np.where(((top if wide else scale) > 1e-30) & np.isfinite(scale), factor, 0)[:, None] * x
        whole = np.rint(products) if wide else np.copysign(np.floor(np.abs(products) + np.float32(0.5)), products)
        whole = np.where(np.isfinite(scale)[:, None], whole, 0).astype(np.int32)
    cache["d"][positions, 0, i] = scale
    cache[f"high{i}"][positions, 0] = (whole + 128) >> 8 if wide else whole
    if wide:
        cache[f"low{i}"][positions, 0] = whole.astype(np.int8)


def indexer_scores(out, q, w, keys, positions, scale):      # [T, S], [T, H, D], [T, H], [S, D], [T]
    """out[t, s] = scale sum_h w[t, h] relu(q[t, h] . keys[s]) for s <= positions[t], else -inf (DeepSeek-V3.2-Exp, lightning indexer)"""
    n_kv = positions[-1] + 1
    dots = np.maximum(np.einsum("thd,sd->ths", q, _floats(keys[:n_kv])), 0)
    out[...] = -np.inf
    out[:, :n_kv] = scale * np.einsum("th,ths->ts", w, dots)
    out[np.arange(out.shape[1]) > positions[:, None]] = -np.inf


def top_k(out, scores):     # int32 [T, k], [T, S]
    """The k greatest scores' indices, ascending; equal scores: the lowest index first; -inf and NaN are never chosen; -1 fills the rest."""
    out[...] = -1
    for chosen, row in zip(out, scores):
        valid = np.flatnonzero(row > -np.inf)
        best = valid[np.argsort(-row[valid], kind="stable")[:out.shape[1]]]
        chosen[:best.size] = np.sort(best)


def indexer_select(out, q, w, keys, positions, scale):      # int32 [T, k], then as indexer_scores
    """indexer_scores and top_k in one"""
    scores = np.empty((q.shape[0], positions[-1] + 1))
    indexer_scores(scores, q, w, keys, positions, scale)
    top_k(out, scores)


def scatter_mask(out, indices, positions):      # [T, S], int32 [T, k], [T]
    """-inf everywhere, 0 at the indices that are not in the token's future"""
    out[...] = -np.inf
    for row, chosen, position in zip(out, indices, positions):
        row[chosen[(chosen >= 0) & (chosen <= position)]] = 0


def _attend(q, latents, bias, n_v, scale):      # [H, D], [S, D], [S] -> [H, n_v]; a row without any key gives zeros
    logits = scale * (q @ latents.T) + bias
    greatest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(logits - np.where(greatest > -np.inf, greatest, 0))
    total = p.sum(axis=-1, keepdims=True)
    return (p / np.where(total > 0, total, 1)) @ latents[:, :n_v]


def dense_attention(out, q, latents, positions, scale):     # [T, H, n_v], [T, H, D], [S, D], [T]
    """Absorbed MLA over every key s <= positions[t]; a key's first n_v values are its value (DeepSeek-V2, section 2.1)"""
    rows = _floats(latents[:positions[-1] + 1])
    for t, position in enumerate(positions):
        out[t] = _attend(q[t], rows[:position + 1], 0, out.shape[-1], scale)


def masked_attention(out, q, latents, mask, positions, scale):      # mask [T, S]
    """dense_attention with an additive mask"""
    rows = _floats(latents[:positions[-1] + 1])
    for t, position in enumerate(positions):
        out[t] = _attend(q[t], rows[:position + 1], mask[t, :position + 1], out.shape[-1], scale)


def sparse_attention(out, q, latents, indices, scale):      # indices int32 [T, k], -1 pads
    """Absorbed MLA over the chosen keys only"""
    for t, chosen in enumerate(indices):
        out[t] = _attend(q[t], _floats(latents[chosen[chosen >= 0]]), 0, out.shape[-1], scale)


def mha_attention(out, q, latents, k_b, v_b, positions, scale):
    # [T, H, n_v], [T, H, n_nope + n_rot], [S, D], [H, kv_lora, n_nope], [H, n_v, kv_lora], [T]
    """MLA in its plain form: each head has keys and values of its own, made from the latents (DeepSeek-V2, section 2.1)"""
    chosen = np.arange(positions[-1] + 1)
    mha_sparse_attention(out, q, latents, np.where(chosen <= positions[:, None], chosen, -1), k_b, v_b, positions, scale)


def mha_sparse_attention(out, q, latents, indices, k_b, v_b, positions, scale):     # indices int32 [T, k], -1 pads
    """mha_attention to the chosen keys only; a token without any gives zeros"""
    rows, kv_lora = _floats(latents[:positions[-1] + 1]), k_b.shape[1]
    for h in range(q.shape[1]):
        keys = np.concatenate([rows[:, :kv_lora] @ k_b[h], rows[:, kv_lora:]], axis=1)
        values = rows[:, :kv_lora] @ v_b[h].T
        for t, chosen in enumerate(indices):
            logits = scale * (keys[chosen[chosen >= 0]] @ q[t, h])
            p = np.exp(logits - logits.max(initial=-np.inf))
            out[t, h] = p @ values[chosen[chosen >= 0]] / p.sum() if p.size else 0


def moe_route(ids, weights, logits, bias, gating, n_group, n_group_used, norm, scale):      # int32 [T, used], [T, used], [T, E], [E]
    """The experts of each token, greatest biased score first, and their weights (DeepSeek-V3, section 2.1.2).

    gating: 1 softmax, 2 sigmoid, 3 softmax over the chosen. A group's score is the sum of its two greatest; n_group 1: no groups.
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
    """out[t, i] = silu(gate_e x[t]) * up_e x[t] with e = ids[t, i]"""
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        hidden = np.empty((token.size, gate.shape[1]), out.dtype)
        silu_mul(hidden, x[token] @ gate[expert].T, x[token] @ up[expert].T)
        out[token, slot] = hidden


def moe_down(out, hidden, ids, weights, down):      # [T, n], [T, used, f], [T, used], [T, used], [E, n, f]
    """out[t] = sum_i weights[t, i] down_e hidden[t, i] with e = ids[t, i]"""
    out[...] = 0
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        out[token] += weights[token, slot, None] * (hidden[token, slot] @ down[expert].T)


def silu_mul(out, gate, up):        # [T, n] each
    """out = gate sigmoid(gate) up"""
    with np.errstate(over="ignore"):
        out[...] = gate / (1 + np.exp(-gate)) * up


def add(out, x, y):     # [T, n] each
    """out = x + y"""
    out[...] = x + y
