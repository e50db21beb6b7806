"""The forward pass of deepseek32 in torch.

Weights have the names and shapes of a GGUF file. Shapes: B rows, T tokens, H heads.

attention is "dense"; "sparse": each token attends to the indexer's top_k keys; or "probabilities": dense, for training the indexer.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tools.demo.start import start_copying
from tools.make_model import tensor_shapes

LAYER_NORM_EPS = 1e-6
BLOCK = 256     # rows of an expert are padded to a multiple of it


class Observed(NamedTuple):
    """What a layer reports of a batch; None where not asked for.

    Its indexer's loss, and the share of attention that the choice holds.
    """
    loss: torch.Tensor
    mass: torch.Tensor


def new_weights(spec, seed):
    """Initial weights, {GGUF name: float32 tensor}.

    The last matrix of a branch starts at zero, so that all layers but the first two start as the identity.
    """
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in tensor_shapes(spec).items():
        if name.endswith("norm.weight"):
            w = torch.ones(shape)
        elif name.endswith(".bias") or "attn_output" in name or "ffn_down" in name:
            w = torch.zeros(shape)
        else:
            std = 0.05 if name == "token_embd.weight" else shape[-1] ** -0.5
            w = torch.randn(shape, generator=generator) * std
        weights[name] = w
    start_copying(weights, spec, generator)
    return weights


def rms(x, w, spec):
    return F.rms_norm(x, w.shape, w.type_as(x), spec.rms_eps)


def narrow(x):
    """x in bfloat16 where products are in bfloat16.

    It is converted once for all the products that follow.
    """
    return x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x


def rope_table(positions, spec):        # [B, T] -> complex64 [B, T, 1, n_rot / 2]
    freqs = spec.freq_base ** (-torch.arange(0, spec.n_rot, 2, dtype=torch.float64) / spec.n_rot)
    angles = positions[..., None, None].double() * freqs
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rope_norm(x, table):        # [B, T, H, n_rot], pairs (2i, 2i + 1)
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * table).flatten(-2).type_as(x)


def rope_neox(x, table):        # pairs (i, i + n_rot / 2)
    a, b = x.float().chunk(2, -1)
    rotated = torch.complex(a, b) * table
    return torch.cat((rotated.real, rotated.imag), -1).type_as(x)


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def experts(x, w, spec, loads):     # [N, n_embd]
    """The sum of the chosen experts of each token and the shared one."""
    p = F.linear(x, w("ffn_gate_inp.weight")).float().sigmoid()
    chosen = (p.detach() + w("exp_probs_b.bias")).topk(spec.n_expert_used).indices
    share = p.gather(1, chosen)
    share = share / share.sum(1, keepdim=True) * spec.expert_weights_scale
    out = swiglu(x, *(w(f"ffn_{part}_shexp.weight") for part in ("gate", "up", "down")))
    order = chosen.flatten().argsort()
    token, share, n = order // spec.n_expert_used, share.flatten()[order], chosen.flatten().bincount(minlength=spec.n_expert)
    loads.append(n)
    for rows, shares, gate, up, down in zip(token.split(n.tolist()), share.split(n.tolist()),
                                            *(w(f"ffn_{part}_exps.weight").unbind() for part in ("gate", "up", "down"))):
        padding = (0, -len(rows) % BLOCK)       # few different shapes, as preparing a product of a new shape takes longer than the product
        rows = F.pad(rows, padding)
        out = out.index_add(0, rows, swiglu(x[rows], gate, up, down) * F.pad(shares, padding)[:, None].type_as(x))
    return out


def index_vectors(h, qr, w, spec, table):       # -> q [B, T, heads, size], keys [B, T, size], head weights [B, T, heads]
    """The indexer's queries, keys and head weights.

    The Hadamard rotation of queries and keys is left out, as it changes no product.
    """
    heads, size, n_rot = spec.indexer_n_head, spec.indexer_head_size, spec.n_rot
    q = F.linear(qr, w("indexer.attn_q_b.weight")).unflatten(-1, (heads, size))
    k = F.layer_norm(F.linear(h, w("indexer.attn_k.weight")).float(), (size,), w("indexer.k_norm.weight"), w("indexer.k_norm.bias"),
                     LAYER_NORM_EPS)
    q = torch.cat((rope_neox(q[..., :n_rot], table), q[..., n_rot:]), -1)
    k = torch.cat((rope_neox(k[..., None, :n_rot], table)[..., 0, :], k[..., n_rot:]), -1)
    return q, k, F.linear(h, w("indexer.proj.weight")).float() / math.sqrt(heads * size)


def index_scores(q, k, head_weights, rows):       # q [R, heads, size], k [S, size], [R, heads], rows [R] -> [R, S], causal
    dots = torch.einsum("rhd,sd->hrs", q, k.type_as(q)).relu()
    scores = torch.einsum("rh,hrs->rs", head_weights, dots.float())
    return scores.masked_fill(torch.arange(k.shape[0]) > rows[:, None], -math.inf)


def choose(q, k, head_weights, spec, block=256):      # -> bool [B, T, T]
    """Where each token may attend: its top_k keys, or all it has."""
    b, t = k.shape[:2]
    allowed = torch.zeros(b, t, t, dtype=torch.bool)
    for i in range(b):
        for start in range(0, t, block):
            stop = min(t, start + block)
            rows = torch.arange(start, stop)
            scores = index_scores(q[i, start:stop], k[i, :stop], head_weights[i, start:stop], rows)
            kept = scores.topk(min(spec.indexer_top_k, stop)).indices
            allowed[i, start:stop, :stop].scatter_(1, kept, True)
            allowed[i, start:stop, :stop] &= rows[:, None] >= torch.arange(stop)
    return allowed


def indexer_loss(vectors, q, k, allowed, spec, n_rows):
    """KL divergence of the indexer's softmax from the attention's.

    The attention is summed over heads and normalised, over the keys `allowed` (None: all before). n_rows random tokens of every batch row
    count. The mass is the share of that attention that the indexer's top_k keys hold.
    """
    losses, masses = [], []
    for i in range(k.shape[0]):
        t = k.shape[1]
        rows = torch.randperm(t)[:n_rows] if n_rows < t else torch.arange(t)
        where = torch.arange(t) <= rows[:, None]
        with torch.no_grad():
            logits = torch.einsum("rhd,shd->hrs", q[i, rows], k[i]).float() * (spec.n_nope + spec.n_rot) ** -0.5
            full = logits.masked_fill(~where, -math.inf).softmax(-1).mean(0)
            target = full
            if allowed is not None:
                where = allowed[i, rows]
                target = logits.masked_fill(~where, -math.inf).softmax(-1).mean(0)
        scores = index_scores(vectors[0][i, rows], vectors[1][i], vectors[2][i, rows], rows)
        found = scores.masked_fill(~where, -math.inf).log_softmax(-1)
        losses.append((torch.xlogy(target, target) - target * found.masked_fill(~where, 0)).sum(-1).mean())
        with torch.no_grad():
            late = rows >= spec.indexer_top_k
            kept = scores[late].topk(min(spec.indexer_top_k, t)).indices
            masses.append(full[late].gather(1, kept).sum(-1).mean() if late.any() else torch.tensor(1.0))
    return Observed(torch.stack(losses).mean(), torch.stack(masses).mean())


def attend(h, w, spec, table, attention, n_rows):       # [B, T, n_embd]
    """A layer's attention: its output, and Observed or None.

    The indexer's inputs are detached: only its own loss trains it.
    """
    heads, n_nope, n_rot, n_lora = spec.n_head, spec.n_nope, spec.n_rot, spec.n_lora_kv
    qr = rms(F.linear(h, w("attn_q_a.weight")), w("attn_q_a_norm.weight"), spec)
    q = F.linear(qr, w("attn_q_b.weight")).unflatten(-1, (heads, n_nope + n_rot))
    q = torch.cat((q[..., :n_nope], rope_norm(q[..., n_nope:], table)), -1)
    latent, k_rot = F.linear(h, w("attn_kv_a_mqa.weight")).split((n_lora, n_rot), -1)
    latent = rms(latent, w("attn_kv_a_norm.weight"), spec)
    k = torch.einsum("btc,hcn->bthn", latent, w("attn_k_b.weight"))
    k_rot = rope_norm(k_rot[..., None, :], table).type_as(k).expand(-1, -1, heads, -1)
    k = torch.cat((k, k_rot), -1)
    v = torch.einsum("btc,hvc->bthv", latent, w("attn_v_b.weight"))
    allowed = observed = None
    if attention != "dense":
        vectors = index_vectors(h.detach(), qr.detach(), w, spec, table)
        if attention == "sparse" and h.shape[1] > spec.indexer_top_k:
            with torch.no_grad():
                allowed = choose(*vectors, spec)
        if n_rows:
            observed = indexer_loss(vectors, q, k, allowed, spec, n_rows)
    q, k, v = (x.transpose(1, 2).type_as(v) for x in (q, k, v))
    if allowed is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mask = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, -math.inf)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(out.transpose(1, 2).flatten(-2), w("attn_output.weight")), observed


def forward(weights, spec, ids, positions=None, attention="dense", n_rows=0):
    """The last norm's output, and what the layers report.

    ids [B, T] -> (output [B, T, n_embd], [Observed] a layer, [tokens of each expert] a layer). n_rows: tokens of each row for which the
    indexer's loss is computed; 0: none.
    """
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    table, x, all_observed, loads = rope_table(positions, spec), weights["token_embd.weight"][ids], [], []
    for il in range(spec.n_layer):
        def w(name):
            return weights[f"blk.{il}.{name}"]

        out, observed = attend(narrow(rms(x, w("attn_norm.weight"), spec)), w, spec, table, attention, n_rows)
        x = x + out.float()
        h = narrow(rms(x, w("ffn_norm.weight"), spec))
        if il < spec.n_layer_dense:
            out = swiglu(h, *(w(f"ffn_{part}.weight") for part in ("gate", "up", "down")))
        else:
            out = experts(h.flatten(0, 1), w, spec, loads).view_as(h)
        x = x + out.float()
        all_observed.append(observed)
    return rms(x, weights["output_norm.weight"], spec), all_observed, loads


def logits(weights, x):
    """Logits from the last norm's output, with the embedding as output matrix."""
    return F.linear(x, weights["token_embd.weight"]).float()
