"""Tensors that some files store in another form than the graph takes.

Matrices may have factors beside them, which multiply their products: linear() and others here record them.
"""
import weakref

import numpy as np

AS_STORED = ("F32", "F16", "BF16")      # types whose transpose is exact
# The type of transposed keys of other types. F16 changes normal weights by an NMSE of 4e-8, Q8_0 would by 3e-5, a hundred times the
# error of the logits. Q8_0 would take half of the bytes, but these are two in a thousand of all weights in V2-Lite, fewer in V3.
KEYS = "F16"


def linear(g, w, label, name, x, *shape):
    """Record the product with the matrix `name`.weight, and its factor."""
    return scaled(g, g.linear(label, w(f"{name}.weight", *shape), x), w, name)


def scaled(g, x, w, name, whole=None):
    """Record the factor of the products x with a matrix, if it has one.

    whole: the name of the matrix that may stand for this one.
    """
    factor = w.factor(_there(w, name, whole))
    return x if factor is None else g.scale(x, factor)


def _there(w, name, whole):
    """The name of the matrix that the file has."""
    return whole if whole and not w.has(f"{name}.weight") else name


def experts(g, w, il, x, ids, weights, n_expert, n_ff):
    """Record the weighted sum of the chosen experts' outputs.

    Factors stand inside of silu: with them, gate and up are products of their own.
    """
    gate, up = gate_and_up(w, n_expert, n_ff, *x.tail)
    gate_factors, up_factors, down_factors = (w.factors(_there(w, name, whole), n_expert) for name, whole in (
        ("ffn_gate_exps", "ffn_gate_up_exps"), ("ffn_up_exps", "ffn_gate_up_exps"), ("ffn_down_exps", None)))
    if gate_factors is up_factors is None:
        hidden = g.moe_gate_up(f"ffn_moe_swiglu-{il}", x, ids, gate, up)
    else:
        parts = []
        for label, matrix, factors in (("gate", gate, gate_factors), ("up", up, up_factors)):
            parts.append(g.moe_linear(f"ffn_moe_{label}-{il}", x, ids, matrix))
            if factors is not None:
                g.expert_scale(parts[-1], ids, factors)
        width = ids.tail[0] * n_ff
        hidden = g.silu_mul(f"ffn_moe_swiglu-{il}", *(part.reshape(width) for part in parts)).reshape(*ids.tail, n_ff)
    if down_factors is not None:
        g.expert_scale(weights.reshape(*ids.tail, 1), ids, down_factors)
    return g.moe_down(f"ffn_moe_out-{il}", hidden, ids, weights, w("ffn_down_exps.weight", n_expert, *x.tail, n_ff))


def gate_and_up(w, n_expert, n_ff, n_embd):
    """The gate and up matrices of the experts.

    Two Tensors, [n_expert, n_ff, n_embd] each. They may be stored as one, with the rows of an expert's gate before those of its up: then
    both are views of the mapped rows.
    """
    names = "ffn_gate_exps.weight", "ffn_up_exps.weight"
    if w.has(names[0]) or not w.has("ffn_gate_up_exps.weight"):
        return tuple(w(name, n_expert, n_ff, n_embd) for name in names)
    both = w.find("ffn_gate_up_exps.weight", n_expert, 2 * n_ff, n_embd)
    return tuple(w.derive(name, both, (n_expert, n_ff, n_embd), data)
                 for name, data in zip(names, (both.data[:, :n_ff], both.data[:, n_ff:])))


def key_and_value_heads(w, n_head, kv_lora, n_nope, n_v):
    """The matrices that make keys and values of latents.

    Two Tensors, [n_head, kv_lora, n_nope] and [n_head, n_v, kv_lora]. Some files have them with the heads' rows in one axis. Files of 2024
    have attn_kv_b instead: for each head the transposed rows of its keys, then the rows of its values. Its halves are made on load.
    """
    shapes = {"attn_k_b.weight": (n_head, kv_lora, n_nope), "attn_v_b.weight": (n_head, n_v, kv_lora)}
    if w.has("attn_k_b.weight") or not w.has("attn_kv_b.weight"):
        return tuple(_with_heads(w, name, shape) for name, shape in shapes.items())
    both = w.find("attn_kv_b.weight", n_head * (n_nope + n_v), kv_lora)
    rows = both.data.reshape(n_head, n_nope + n_v, -1)
    kind = both.type if both.type in AS_STORED else KEYS
    size = {"F32": 4}.get(kind, 2)
    (k_name, k_shape), (v_name, v_shape) = shapes.items()
    k_b = w.derive(k_name, both._replace(type=kind), k_shape, *_made(
        (n_head, kv_lora, n_nope * size), lambda: _transposed(both, rows[:, :n_nope], k_shape, size)))
    v_b = w.derive(v_name, both, v_shape, *_made((n_head, n_v, rows.shape[2]), lambda: np.ascontiguousarray(rows[:, n_nope:])))
    return k_b, v_b


def _with_heads(w, name, shape):
    """The Tensor of this shape, stored so or as rows [heads * rows, width]."""
    flat = (shape[0] * shape[1], shape[2])
    if w.shape(name) != flat:
        return w(name, *shape)
    tensor = w.find(name, *flat)
    return w.derive(name, tensor, shape, tensor.data.reshape(*shape[:2], -1))


def _transposed(tensor, rows, shape, size):
    """Rows of keys, [n_head, n_nope, bytes], transposed for each head.

    They are bytes of their own float type, or of the type KEYS.
    """
    if tensor.type in AS_STORED:
        values = rows.view(f"u{size}")
    else:
        from pydsa.backends import reference
        values = reference.weight(tensor._replace(shape=(shape[0], shape[2], shape[1]), data=np.ascontiguousarray(rows)))
        with np.errstate(over="ignore"):        # an infinity is met as other damaged weights are
            values = values.astype(np.float16)
    return np.ascontiguousarray(values.transpose(0, 2, 1)).view(np.uint8)


def _made(shape, build):
    """(data, make) of a Tensor whose bytes are made when they are read.

    The data have the shape of those bytes and take no memory. What was made is made again only if nobody holds it any more.
    """
    kept = [lambda: None]

    def make():
        data = kept[0]()
        if data is None:
            data = build()
            data.flags.writeable = False
            kept[0] = weakref.ref(data)
        return data

    return np.broadcast_to(np.zeros(1, np.uint8), shape), make


def made_bytes(tensors):
    """Bytes of those of the tensors that are made on load."""
    return sum(tensor.data.nbytes for tensor in tensors if tensor.make is not None)
