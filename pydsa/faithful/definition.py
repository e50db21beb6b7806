"""Sparse attention as it was published, for one layer at a time.

A second implementation, in numpy and float64, of the lightning indexer (DeepSeek-V3.2-Exp, section 2) and of attention to latents
(DeepSeek-V2, section 2.1). It shares no code with the graphs and the ops, so that it can tell whether these are right: it starts from the
products of a layer's matrices. Rule says how an indexer computes its scores, and FAULTS how wrong ones do.
"""
from typing import NamedTuple

import numpy as np

HALVES, NEIGHBOURS = "halves", "neighbours"     # RoPE rotates pairs of values (i, i + n_rot / 2), or (2i, 2i + 1)
INDEXER_PAIRS = {"deepseek32": HALVES, "glm-dsa": NEIGHBOURS}
KEY_NORM_EPS = 1e-6
SHARING_CONTEXT = 1_048_576     # models of glm-dsa with this context share choices
AT_ONCE = 1 << 23               # products of heads and keys that are in memory at a time


class Rule(NamedTuple):
    """How an indexer computes its scores."""
    pairs: str | None               # of RoPE; None: no RoPE
    relu: bool = True
    weights: bool = True            # whether heads have weights
    norm: bool = True               # whether keys have a layer norm
    first: bool = True              # whether RoPE is on the first values of a head, else on the last
    shift: int = 0                  # added to the positions of queries
    rotated: tuple = (True, True)   # whether queries, and keys, have the Hadamard rotation
    scaled: bool = True             # whether an integer key's scale counts


def rule_of(config):
    """The Rule of the indexers of a model with this Config."""
    return Rule(INDEXER_PAIRS[config.architecture])


def faults(rule):
    """Sentences on wrong indexers, each with its Rule."""
    other = NEIGHBOURS if rule.pairs == HALVES else HALVES
    return {
        f"RoPE rotates {other}, expected {rule.pairs}": rule._replace(pairs=other),
        "RoPE is left out": rule._replace(pairs=None),
        "RoPE is on the last values of a head, expected the first": rule._replace(first=False),
        "the positions of queries are one too great": rule._replace(shift=1),
        "the positions of queries are one too small": rule._replace(shift=-1),
        "ReLU is left out": rule._replace(relu=False),
        "the weights of heads are left out": rule._replace(weights=False),
        "the layer norm of keys is left out": rule._replace(norm=False),
        # the matrix is symmetric, so that it makes no difference which
        "only one of queries and keys has the Hadamard rotation": rule._replace(rotated=(True, False)),
        "the scales of cached keys are left out": rule._replace(scaled=False),
    }


def rotate(x, positions, rope, pairs):
    """RoPE of values [n, ..., n_rot] at positions [n] -> a new array."""
    angles = positions.reshape(-1, *[1] * (x.ndim - 1)) * rope.freqs
    turned = rope.magnitude * np.exp(1j * angles)
    half = x.shape[-1] // 2
    if pairs == HALVES:
        both = (x[..., :half] + 1j * x[..., half:]) * turned
        return np.concatenate((both.real, both.imag), axis=-1)
    both = (x[..., 0::2] + 1j * x[..., 1::2]) * turned
    return np.stack((both.real, both.imag), axis=-1).reshape(x.shape)


def hadamard(size):
    """The orthonormal Hadamard matrix [size, size] in Sylvester's order."""
    signs = np.ones((1, 1))
    while len(signs) < size:
        signs = np.kron([[1, 1], [1, -1]], signs)
    return signs / np.sqrt(size)


def rounded(rows, kind, widths):
    """Rows [n, sum(widths)] as a cache of a type holds them, float64.

    Integer types have a scale for each part of a row, by which its largest magnitude becomes 127, or 127 * 256.
    """
    rows = np.asarray(rows, np.float32)
    if kind == "bf16":
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    if kind in ("f32", "f16"):
        return rows.astype(kind.replace("f", "float")).astype(np.float64)
    parts = []
    for part in np.split(rows, np.cumsum(widths)[:-1], axis=1):
        step = np.abs(part).max(axis=1, keepdims=True).astype(np.float64) / (127 if kind == "i8" else 127 * 256)
        parts.append(np.rint(part / np.where(step > 0, step, 1)) * step)
    return np.concatenate(parts, axis=1)


def choosers(metadata, n_layer):
    """For each layer, the layer whose indexer chooses its keys.

    metadata: the file's key-value pairs.
    """
    own = [True] * n_layer
    if metadata["general.architecture"] == "glm-dsa":
        types = metadata.get("glm-dsa.attention.indexer.types")
        if types is not None:
            own = [bool(t) for t in types[:n_layer]]
        elif metadata["glm-dsa.context_length"] >= SHARING_CONTEXT:
            own = [il in (0, 1) or (il - 2) % 4 == 0 for il in range(n_layer)]
    last, found = 0, []
    for il in range(n_layer):
        last = il if own[il] else last
        found.append(last)
    return found


def best(scores, k):
    """The k greatest of scores [S], the first of equal ones -> a mask [S]."""
    chosen = scores > -np.inf
    if chosen.sum() > k:
        least = np.partition(scores, -k)[-k]
        chosen = scores > least
        chosen[np.flatnonzero(scores == least)[:k - chosen.sum()]] = True
    return chosen


def _products(q, keys):
    """The products [n, H, S] of queries [n, H, D] and keys [S, D].

    It is one product of two matrices, as products of stacks take longer.
    """
    return (q.reshape(-1, q.shape[2]) @ keys.T).reshape(*q.shape[:2], len(keys))


class Indexer:
    """The indexer of a layer.

    config: a model's Config. norm: (weights, bias) of the keys' layer norm, [D] each.
    """

    def __init__(self, config, norm):
        self._config, self._norm = config, norm
        self._rotation = hadamard(config.indexer_head_size)
        self._rule = rule_of(config)

    def _placed(self, x, positions, rule):
        """Values of heads [n, ..., D] with RoPE."""
        c, x = self._config, x.astype(np.float64)
        if rule.pairs is not None:
            part = slice(0, c.n_rot) if rule.first else slice(c.indexer_head_size - c.n_rot, None)
            x[..., part] = rotate(x[..., part], positions, c.rope, rule.pairs)
        return x

    def keys(self, raw, kind="f32", rule=None):
        """The keys [S, D] of the products [S, D] of tokens from position 0 on.

        They are rotated, and rounded as a cache of this type does.
        """
        rule, x = rule or self._rule, raw.astype(np.float64)
        if rule.norm:
            x = x - x.mean(axis=1, keepdims=True)
            x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + KEY_NORM_EPS) * self._norm[0] + self._norm[1]
        x = self._placed(x, np.arange(len(x)), rule)
        x = rounded(x @ self._rotation if rule.rotated[1] else x, kind, (x.shape[1],))
        return x if rule.scaled else x / np.abs(x).max(axis=1, keepdims=True)

    def scores(self, raw, weights, keys, positions, rule=None):
        """The scores [n, S] of all keys [S, D] for n tokens; -inf for later keys.

        raw: the products [n, H, D] of the queries. weights: [n, H].
        """
        rule = rule or self._rule
        q, n_keys = self._placed(raw, positions + rule.shift, rule), len(keys)
        q = q @ self._rotation if rule.rotated[0] else q
        weights = weights.astype(np.float64) if rule.weights else np.ones(weights.shape)
        scores, n = np.empty((len(q), n_keys)), max(1, AT_ONCE // (q.shape[1] * n_keys))
        for start in range(0, len(q), n):
            rows = slice(start, start + n)
            dots = _products(q[rows], keys)
            scores[rows] = np.einsum("th,ths->ts", weights[rows], np.maximum(dots, 0) if rule.relu else dots)
        scores[np.arange(n_keys) > positions[:, None]] = -np.inf
        return scores


def latents(config, raw, norm, positions, kind="f32"):
    """The cached rows [n, kv_lora + n_rot] of products of the same shape.

    norm: weights [kv_lora]. The rows are rounded as a cache of this type does.
    """
    c, x = config, raw.astype(np.float64)
    latent = x[:, :c.kv_lora]
    latent = latent / np.sqrt(np.mean(latent * latent, axis=1, keepdims=True) + c.rms_eps) * norm
    return rounded(np.concatenate((latent, rotate(x[:, c.kv_lora:], positions, c.rope, NEIGHBOURS)), axis=1), kind, (c.kv_lora, c.n_rot))


class Attention:
    """The attention of a layer to latents.

    k_b [H, kv_lora, n_nope], v_b [H, n_v, kv_lora]: what makes keys and values of latents.
    """

    def __init__(self, config, k_b, v_b):
        self._config, self._k_b, self._v_b = config, k_b, v_b
        self._scale = config.rope.mscale ** 2 / np.sqrt(config.n_nope + config.n_rot)

    def shares(self, raw, latents, positions):
        """Yield (i, [H, S]) for each of n tokens: its dense attention.

        raw: the products [n, H, n_nope + n_rot] of the queries. latents: [S, kv_lora + n_rot], of which later ones get 0.
        """
        c = self._config
        q = np.concatenate((np.einsum("thi,hoi->tho", raw[..., :c.n_nope].astype(np.float64), self._k_b),
                            rotate(raw[..., c.n_nope:].astype(np.float64), positions, c.rope, NEIGHBOURS)), axis=2)
        n = max(1, AT_ONCE // (q.shape[1] * len(latents)))
        for start in range(0, len(q), n):
            for i, logits in enumerate(self._scale * _products(q[start:start + n], latents), start):
                logits[:, positions[i] + 1:] = -np.inf
                shares = np.exp(logits - logits.max(axis=1, keepdims=True))
                yield i, shares / shares.sum(axis=1, keepdims=True)

    def outputs(self, shares, latents):
        """The outputs [H, n_v] of attention to n latents, with shares [H, n].

        Shares are of these keys only, whatever they sum to.
        """
        mixed = shares @ latents[:, :self._config.kv_lora] / shares.sum(axis=1, keepdims=True)
        return np.einsum("hi,hoi->ho", mixed, self._v_b)
