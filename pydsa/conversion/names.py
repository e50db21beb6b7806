"""Which GGUF tensors a checkpoint becomes, and of which of its weights.

    outputs, notes, n_nextn = outputs_of(checkpoint, shape)
    for piece in outputs[0].pieces: piece()         # float32 [rows, width], in order

A table says for each tensor of Hugging Face what it must look like; what is missing, has another shape or is left over is refused.
"""
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from pydsa.conversion.scales import weights
from pydsa.errors import CheckpointError, UnsupportedModelError
from pydsa.gguf.file import quote

PIECE = 1 << 22             # float32 values that are made at a time, 16 MiB; a head's or an expert's are never divided further than rows
IDLE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
EXPERT_PARTS = ("gate", "up", "down")


class Output(NamedTuple):
    """A tensor of the GGUF file, made piece by piece.

    pieces: functions, each of which returns float32 [rows, shape[-1]] of a new array. parts: the Weights that it is made of.
    """
    name: str
    shape: tuple
    pieces: list
    parts: list


def outputs_of(checkpoint, shape):
    """(list of Output, notes, MTP blocks) of a Checkpoint with a Shape.

    notes: sentences on what is left out. MTP blocks: how many the files have. Raises CheckpointError where a tensor is missing or has
    another shape, UnsupportedModelError for a tensor that is unknown.
    """
    table = _Table(checkpoint, shape)
    s = shape
    table.add("model.embed_tokens.weight", "token_embd.weight", (s.n_vocab, s.n_embd))
    n_blocks = s.n_layer + s.n_nextn * any(name.startswith(f"model.layers.{s.n_layer}.") for name in table.weights)
    if n_blocks < s.n_layer + s.n_nextn:
        table.notes.append(f"{s.n_nextn} MTP block(s) are declared, but are not in the files; the output has none.")
    for il in range(n_blocks):
        _add_block(table, s, il)
    table.add("model.norm.weight", "output_norm.weight", (s.n_embd,))
    if not s.tied:
        table.add("lm_head.weight", "output.weight", (s.n_vocab, s.n_embd))
    else:
        table.skip("lm_head.weight")
    return table.finish(), table.notes, n_blocks - s.n_layer


class _Table:
    """The weights of a checkpoint, of which outputs are made in turn."""

    def __init__(self, checkpoint, shape):
        self.weights, idle = weights(checkpoint)
        self.outputs, self.notes, self._path, self._arch = [], [], checkpoint.folder, shape.arch
        self._used = {name for name in self.weights if IDLE.fullmatch(name)}
        if idle:
            self.notes.append(f"{len(idle)} scales of activations, such as {quote(idle[0])}, are left out: GGUF quantizes weights only.")

    def __contains__(self, name):
        return name in self.weights

    def take(self, name, shape):
        """The Weight of a name, which must have a shape."""
        weight = self.weights.get(name)
        if weight is None:
            raise CheckpointError(f"{self._path}: there is no tensor {quote(name)}, expected one with the shape {list(shape)}.")
        if weight.shape != tuple(shape):
            raise CheckpointError(f"{weight.path}: {quote(name)} has the shape {list(weight.shape)}, config.json expects {list(shape)}.")
        self._used.add(name)
        return weight

    def add(self, name, target, shape, order=None, unit=1):
        """Add the output of one weight.

        order: int [rows]: which row of the weight each row is; it stays within units of so many rows.
        """
        weight = self.take(name, shape)
        self.outputs.append(Output(target, tuple(shape), list(_rows(weight, order, unit)), [weight]))

    def skip(self, name):
        """Leave a weight out, if there is one."""
        self._used.add(name)

    def finish(self):
        """The outputs, if all weights are used."""
        unknown = sorted(self.weights.keys() - self._used)
        if unknown:
            raise UnsupportedModelError(f"{self.weights[unknown[0]].path}: pydsa does not know what {len(unknown)} tensor(s) such as "
                                        f"{quote(unknown[0])} do in {self._arch}, and would leave them out.")
        return self.outputs


def _rows(weight, order=None, unit=1):
    """Yield functions that read a weight's rows, some at a time."""
    if len(weight.shape) == 1:
        yield functools.partial(_read_vector, weight, order)
        return
    unit = 1 if order is None else unit
    step = max(1, PIECE // math.prod(weight.shape[1:]) // unit) * unit
    for first in range(0, weight.shape[0], step):
        yield functools.partial(_read_rows, weight, first, min(first + step, weight.shape[0]), order)


def _read_vector(weight, order):
    values = weight.read()
    return (values if order is None else values[order])[None]


def _read_rows(weight, first, last, order):
    values = weight.read(first, last)
    return values if order is None else values[order[first:last] - first]


def _add_block(table, s, il):
    """Add the tensors of a layer, or of an MTP block."""
    source, target, mtp = f"model.layers.{il}.", f"blk.{il}.", il >= s.n_layer

    def add(name, to, *shape, **options):
        table.add(source + name, target + to, shape, **options)

    if mtp:
        add("eh_proj.weight", "nextn.eh_proj.weight", s.n_embd, 2 * s.n_embd)
        for name, to in ("enorm", "enorm"), ("hnorm", "hnorm"):
            add(f"{name}.weight", f"nextn.{to}.weight", s.n_embd)
        for name, to, shape in (("shared_head.norm", "shared_head_norm", (s.n_embd,)),
                                ("shared_head.head", "shared_head_head", (s.n_vocab, s.n_embd)),
                                ("embed_tokens", "embed_tokens", (s.n_vocab, s.n_embd))):
            if f"{source}{name}.weight" in table:
                add(f"{name}.weight", f"nextn.{to}.weight", *shape)
    add("input_layernorm.weight", "attn_norm.weight", s.n_embd)
    _add_attention(table, s, add, source + "self_attn.", target)
    indexer = source + "self_attn.indexer."
    if s.index_heads and (not mtp and s.full[il] or mtp and f"{indexer}wk.weight" in table):
        _add_indexer(s, add)
    elif s.index_heads and f"{indexer}wk.weight" in table:
        for part in "wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight":
            table.skip(indexer + part)
        table.notes.append(f"The indexer of layer {il} is left out: the layer uses the choice of an earlier one.")
    add("post_attention_layernorm.weight", "ffn_norm.weight", s.n_embd)
    if il < s.n_lead:
        _add_ffn(add, "mlp.", "", s.n_ff, s.n_embd)
    else:
        _add_experts(table, s, add, source + "mlp.", target)


def _add_attention(table, s, add, source, target):
    """Add the tensors of latent attention; kv_b becomes two."""
    n_key = s.n_nope + s.n_rot
    order = None if s.interleaved else _neighbours(np.arange(s.n_head * n_key).reshape(s.n_head, n_key), s.n_nope)
    if s.q_lora:
        add("self_attn.q_a_proj.weight", "attn_q_a.weight", s.q_lora, s.n_embd)
        add("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", s.q_lora)
        add("self_attn.q_b_proj.weight", "attn_q_b.weight", s.n_head * n_key, s.q_lora, order=order, unit=n_key)
    else:
        add("self_attn.q_proj.weight", "attn_q.weight", s.n_head * n_key, s.n_embd, order=order, unit=n_key)
    rows = s.kv_lora + s.n_rot
    order = None if s.interleaved else _neighbours(np.arange(rows)[None], s.kv_lora)
    add("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", rows, s.n_embd, order=order, unit=rows)
    add("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", s.kv_lora)
    both = table.take(source + "kv_b_proj.weight", (s.n_head * (s.n_nope + s.n_v), s.kv_lora))
    heads = range(s.n_head)
    table.outputs.append(Output(target + "attn_k_b.weight", (s.n_head, s.kv_lora, s.n_nope),
                                [functools.partial(_keys_of, both, s, head) for head in heads], [both]))
    table.outputs.append(Output(target + "attn_v_b.weight", (s.n_head, s.n_v, s.kv_lora),
                                [functools.partial(_values_of, both, s, head) for head in heads], [both]))
    add("self_attn.o_proj.weight", "attn_output.weight", s.n_embd, s.n_head * s.n_v)


def _keys_of(both, s, head):
    """The rows of kv_b that make a head's keys, transposed."""
    first = head * (s.n_nope + s.n_v)
    return np.ascontiguousarray(both.read(first, first + s.n_nope).T)


def _values_of(both, s, head):
    """The rows of kv_b that make a head's values."""
    first = head * (s.n_nope + s.n_v) + s.n_nope
    return both.read(first, first + s.n_v)


def _neighbours(rows, start):
    """Reorder [heads, size]: from `start` on, halves become neighbours."""
    rope = rows[:, start:]
    half = rope.shape[1] // 2
    together = np.stack([rope[:, :half], rope[:, half:]], axis=2).reshape(len(rows), -1)
    return np.concatenate([rows[:, :start], together], axis=1).reshape(-1)


def _halves(rows, stop):
    """Reorder [heads, size]: up to `stop`, neighbours become halves."""
    return np.concatenate([rows[:, 0:stop:2], rows[:, 1:stop:2], rows[:, stop:]], axis=1).reshape(-1)


def _add_indexer(s, add):
    """Add an indexer, with RoPE on the pairs that its architecture has."""
    def order(heads):
        rows = np.arange(heads * s.index_size).reshape(heads, s.index_size)
        if s.index_interleaved == (s.arch == "glm-dsa"):
            return None
        if s.index_interleaved:
            return _halves(rows, s.n_rot)
        return np.concatenate([_neighbours(rows[:, :s.n_rot], 0).reshape(heads, -1), rows[:, s.n_rot:]], axis=1).reshape(-1)

    add("self_attn.indexer.wq_b.weight", "indexer.attn_q_b.weight", s.index_heads * s.index_size, s.q_lora, order=order(s.index_heads),
        unit=s.index_size)
    add("self_attn.indexer.wk.weight", "indexer.attn_k.weight", s.index_size, s.n_embd, order=order(1), unit=s.index_size)
    add("self_attn.indexer.k_norm.weight", "indexer.k_norm.weight", s.index_size, order=order(1))
    add("self_attn.indexer.k_norm.bias", "indexer.k_norm.bias", s.index_size, order=order(1))
    add("self_attn.indexer.weights_proj.weight", "indexer.proj.weight", s.index_heads, s.n_embd)


def _add_ffn(add, source, end, n_ff, n_embd):
    """Add a feed-forward network."""
    for part in EXPERT_PARTS:
        shape = (n_embd, n_ff) if part == "down" else (n_ff, n_embd)
        add(f"{source}{part}_proj.weight", f"ffn_{part}{end}.weight", *shape)


def _add_experts(table, s, add, source, target):
    """Add the router and the experts, whose matrices become one each."""
    add("mlp.gate.weight", "ffn_gate_inp.weight", s.n_expert, s.n_embd)
    if f"{source}gate.e_score_correction_bias" in table:
        add("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", s.n_expert)
    fused = f"{source}experts.gate_up_proj" in table
    for part in EXPERT_PARTS:
        shape = (s.n_embd, s.n_ff_exp) if part == "down" else (s.n_ff_exp, s.n_embd)
        if fused:
            name, rows = ("down_proj", s.n_embd) if part == "down" else ("gate_up_proj", 2 * s.n_ff_exp)
            parts = [table.take(f"{source}experts.{name}", (s.n_expert, rows, shape[1]))]
            first = s.n_ff_exp if part == "up" else 0
            pieces = [functools.partial(_expert_of, parts[0], e, first, first + shape[0]) for e in range(s.n_expert)]
        else:
            parts = [table.take(f"{source}experts.{e}.{part}_proj.weight", shape) for e in range(s.n_expert)]
            pieces = [piece for weight in parts for piece in _rows(weight)]
        table.outputs.append(Output(f"{target}ffn_{part}_exps.weight", (s.n_expert, *shape), pieces, parts))
    if s.n_shared:
        _add_ffn(add, "mlp.shared_experts.", "_shexp", s.n_shared * s.n_ff_exp, s.n_embd)


def _expert_of(weight, expert, first, last):
    """Rows of one expert, where all are stored in one tensor."""
    return weight.read(expert, expert + 1)[0, first:last]
