"""Collect an imatrix: a hook that sums the squares of what products read.

Every step takes MLA's absorbed form with the indexer: only there does each matrix have inputs of its own, as in llama.cpp.
"""
from typing import NamedTuple

import numpy as np

from pydsa.errors import DamagedWeightsError, PydsaError
from pydsa.executor.graph import CacheRef
from pydsa.executor.hooks import Hook
from pydsa.executor.schedule import VARIANTS
from pydsa.imatrix.matrix import Imatrix
from pydsa.options import counts
from pydsa.signals import interrupts_held
from pydsa.stepping import check_ids

# op -> the places of its input, of the experts' ids if it has any, and of its matrices
PRODUCTS = {"linear": (2, None, (1,)), "head_linear": (2, None, (1,)), "moe_linear": (1, 2, (3,)), "moe_gate_up": (1, 2, (3, 4)),
            "moe_down": (1, 2, (4,))}
KV_B = "attn_kv_b.weight"       # its halves are products of their own; what it meets itself are the latents, before they are cached
TOGETHER = 16       # rows whose squares are added in float32; the sums of these, in float64


class Reading(NamedTuple):
    """An input that is read before one op, for all matrices that meet it."""
    names: list         # of the tensors in the file
    x: int              # its place among the op's arguments
    ids: int | None     # that of the experts' ids
    n_expert: int
    width: int | None   # only the first columns count
    factor: float       # it is this many times what the matrix meets
    heads_as_rows: bool     # each head has a row of its own; else its columns are its own


class Collector(Hook):
    """Sums of squares of the inputs of a model's matrices, a hooks.Hook.

    The sums of a step count when it is committed. process_output: the output matrix counts too, in steps with logits for each token.
    """

    def __init__(self, model, variant, process_output=False):
        self._plan = _plan(model.setup, model.setup.layouts[variant].graph.nodes, process_output)
        self._path = model.metadata.path
        self._sums, self._counts, self._new = {}, {}, {}

    def wants(self, node):
        return (node.op, node.name) in self._plan

    def before(self, call):
        """Add the squares of an op's inputs to those of the step."""
        key = call.node.op, call.node.name
        for i, reading in enumerate(self._plan[key]):
            x = call.read(reading.x)[..., :reading.width]
            if reading.ids is not None:
                sums, counts = _sums_of_experts(x, call.read(reading.ids), reading.n_expert)
            else:
                rows = x.reshape(-1, x.shape[-1]) if reading.heads_as_rows else x
                sums, counts = _sums(rows).reshape(-1) / reading.factor ** 2, np.array([len(rows)])
            before = self._new.get((*key, i), (0, 0))
            self._new[*key, i] = before[0] + sums, before[1] + counts

    def commit(self):
        """Let the sums of the steps since the last call count.

        Raises DamagedWeightsError if one is not finite: nothing counts then.
        """
        for (op, name, i), (sums, _) in self._new.items():
            if not np.isfinite(sums).all():
                raise DamagedWeightsError(f"{self._path}: what {self._plan[op, name][i].names[0]!r} is multiplied with is not finite: the "
                                          "weights are damaged, or a computation overflowed.")
        with interrupts_held():
            for key, (sums, n_rows) in self._new.items():
                if key in self._sums:
                    self._sums[key] += sums
                    self._counts[key] += n_rows
                else:
                    self._sums[key], self._counts[key] = sums, n_rows
            self._new = {}

    def imatrix(self, dataset, chunk_size):
        """The Imatrix so far; its arrays go on growing with the next commits."""
        sums, counts = {}, {}
        for op, name, i in self._sums:
            for tensor in self._plan[op, name][i].names:
                sums[tensor], counts[tensor] = self._sums[op, name, i], self._counts[op, name, i]
        return Imatrix(sums, counts, [dataset], chunk_size)


def _plan(setup, nodes, process_output):
    """{(op, name) of a node: its Readings}.

    Matrices with the same inputs share a reading, at the first of their nodes.
    """
    plan, readings, wholes = {}, {}, set()
    for node in nodes:
        x, ids, matrices = PRODUCTS.get(node.op, (0, None, ()))
        for tensor in (node.args[i] for i in matrices):
            name = tensor.made_of or tensor.name
            if name.endswith(KV_B):
                wholes.add(name)
                continue
            if not name.startswith("blk.") and not process_output:      # the output matrix
                continue
            key = node.args[x], None if ids is None else node.args[ids]
            if key not in readings:
                rows = node.op == "head_linear" and len(setup.file.tensors[name].shape) == 2
                factor = setup.weights.factor(name.removesuffix(".weight")) if name.endswith(".attn_k_b.weight") else None
                readings[key] = Reading([], x, ids, tensor.shape[0], None, factor or 1.0, rows)
                plan.setdefault((node.op, node.name), []).append(readings[key])
            if name not in readings[key].names:
                readings[key].names.append(name)
    for node in nodes:
        ref = node.args[0]
        name = f"blk.{ref.layer}.{KV_B}" if isinstance(ref, CacheRef) and ref.kind == "latents" else None
        if node.op == "cache_write" and name in wholes:
            width = setup.file.tensors[name].shape[-1]
            plan[node.op, node.name] = [Reading([name], 1, None, 1, width, 1.0, False)]
    return plan


def _sums(x):
    """Sums of squares over the tokens: [T, ...] -> float64 [...]."""
    whole = len(x) // TOGETHER * TOGETHER
    blocks, rest = x[:whole].reshape(-1, TOGETHER, *x.shape[1:]), x[whole:]
    return (np.einsum("bt...,bt...->b...", blocks, blocks).sum(0, dtype=np.float64)
            + np.einsum("t...,t...->...", rest, rest).astype(np.float64))


def _sums_of_experts(x, ids, n_expert):
    """Sums of squares, and counts, of the rows that go to each expert.

    x: [T, n], or [T, used, n] if a token has a row for each expert. ids: [T, used]. Returns float64 [n_expert * n] and int64 [n_expert].
    """
    order = np.argsort(ids, axis=None, kind="stable")
    rows, order = (x, order // ids.shape[1]) if x.ndim == 2 else (x.reshape(-1, x.shape[-1]), order)
    counts = np.bincount(ids.reshape(-1), minlength=n_expert)
    sums, start = np.zeros((n_expert, x.shape[-1])), 0
    for expert, count in enumerate(counts):
        if count:
            sums[expert] = _sums(rows[order[start:start + count]])
            start += count
    return sums.reshape(-1), counts


def absorbed_variant(model):
    """The name of the variant in which each matrix has inputs of its own.

    Raises PydsaError if the model was loaded without it.
    """
    for name in model.setup.schedule.variants:
        if not VARIANTS[name].plain and (VARIANTS[name].chooses or model.top_k is None):
            return name
    raise PydsaError(f"The model was loaded with attention={model.attention!r} and n_ctx={model.n_ctx}, where its indexer never runs, "
                     "expected attention='sparse'.")


def chunks_of(ids, chunk_size, first=0, n_chunks=None):
    """Divide token ids into chunks, int32 [n, chunk_size], as llama.cpp does.

    first: chunks that are left out; n_chunks: how many at most, None for all. What remains at the end is left out. Raises
    PydsaError if there is no whole chunk.
    """
    n = ids.size // chunk_size - first
    if n < 1:
        raise PydsaError(f"The text has {ids.size} tokens, expected at least {(first + 1) * chunk_size} for "
                         + (f"one chunk of {chunk_size} after the first {first}" if first else f"one chunk of {chunk_size}")
                         + ": give a longer text, or a smaller chunk (-c).")
    n = n if n_chunks is None else min(n, n_chunks)
    return ids[first * chunk_size:(first + n) * chunk_size].reshape(n, chunk_size).copy()


def collect(model, ids, chunk_size=None, first=0, n_chunks=None, process_output=False, dataset="", progress=None, score=None):
    """Run a text in chunks -> an iterator of the Imatrix after each.

    Each chunk is a context of its own, which begins with BOS if the file wants it. The arrays of an Imatrix go on growing: the last one is
    that of the text, and is at every time that of the chunks which are complete.

    ids: token ids of the text. chunk_size: tokens of a chunk; None: the model's n_ctx. first, n_chunks: as for chunks_of().
    process_output: the output matrix counts too, which takes the logits of each token. dataset: a name for the text. progress(done, total):
    called after each layer, with tokens. score(ids, logits): called for each chunk with the tokens of its second half, int32 [n], and the
    logits of which each came, float32 [n, n_vocab]. Raises PydsaError for a model loaded without its indexer, for values that are not
    valid, and where no chunk is whole.
    """
    chunk_size, n_chunks, skipped = counts(2**31 - 1, chunk_size=chunk_size, n_chunks=n_chunks, first=first or None)
    chunk_size, variant = chunk_size or model.n_ctx, absorbed_variant(model)
    if chunk_size > model.n_ctx:
        raise PydsaError(f"A chunk has {chunk_size} tokens, expected at most {model.n_ctx}, the model's n_ctx (-c).")
    chunks = chunks_of(check_ids(ids, model.config.n_vocab), chunk_size, skipped or 0, n_chunks)
    if model.tokenizer.add_bos:
        chunks[:, 0] = model.tokenizer.bos_id
    return _collect(model, variant, chunks, process_output, dataset, progress, score)


def _collect(model, variant, chunks, process_output, dataset, progress, score):
    first = chunks.shape[1] // 2        # the first token whose successor is scored, as in llama.cpp
    n_scored = 0 if score is None else chunks.shape[1] - 1 - first
    n_logits = chunks.shape[1] if process_output else n_scored + 1
    collector, session = Collector(model, variant, process_output), model.session()
    session.hooks, session.variant = (collector,), variant
    dataset = dataset.encode(errors="replace").decode()     # a name of a file may have bytes that are no text
    for i, chunk in enumerate(chunks):
        session.truncate(0)
        report = None if progress is None else lambda done, total: progress(i * total + done, len(chunks) * total)
        logits = session.logits(chunk, report, last=n_logits)
        collector.commit()
        if n_scored:
            score(chunk[-n_scored:], logits[-1 - n_scored:-1])
        yield collector.imatrix(dataset, chunks.shape[1])
