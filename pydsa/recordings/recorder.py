"""The hook that records what a session's tokens choose (recording.py)."""
import contextlib
import dataclasses
from collections.abc import Mapping

import numpy as np

from pydsa.chat import chat_prompt
from pydsa.errors import PydsaError
from pydsa.executor.hooks import Hook, layer_of
from pydsa.options import counts
from pydsa.recordings import packed
from pydsa.recordings.file import CHUNK, FIELDS, OF_TOKENS, Facts, Reader, Writer
from pydsa.recordings.recording import Recording
from pydsa.selections.dense import attention_of, index_of
from pydsa.signals import interrupts_held

PENDING = 1 << 24       # bytes of choices that are not packed yet, about
LIMIT = 1 << 30         # bytes of a recording in memory, if nothing else is said
ATTENTION = {"sparse_attention": 3, "mha_sparse_attention": 3, "masked_attention": None}     # op -> its argument with the chosen keys


def facts_of(setup, fields):
    """The Facts of recordings of a setup.Setup."""
    c = setup.config
    experts = tuple(range(c.n_layer_dense_lead, c.n_layer)) if c.n_expert else ()
    top_k = None if c.top_k is None else min(c.top_k, setup.n_ctx)
    return Facts(tuple(fields), c.n_layer, top_k, c.indexed_layers, experts, c.n_expert, c.n_expert_used, c.n_vocab, setup.fingerprint,
                 c.name, c.architecture, setup.attention, setup.kv_type, setup.index_type, setup.device_name)


def record(model, prompt, max_tokens=0, select=None, sampling=None, **options):
    """Run a prompt in a new context, and an answer to it -> the Recording.

    prompt: a text, token ids, or the messages of a conversation. max_tokens: tokens of the answer at most; the last one is not run, and not
    recorded. select: as Session.select. sampling: a Sampling. options: those of Session.record(). Raises the errors of these.
    """
    if isinstance(prompt, str):
        prompt = model.tokenize(prompt)
    elif any(isinstance(message, Mapping) for message in prompt):
        prompt = chat_prompt(model.tokenizer, prompt).ids
    session = model.session()
    session.select = select
    with session.record(**options) as recording:
        for _ in session.generate(prompt, max_tokens, sampling):
            pass
    return recording


def chooses(setup):
    """Whether keys are chosen, so that there is a selection to record."""
    return setup.config.top_k is not None and setup.attention != "dense"


def _check_choice(setup):
    """Raise PydsaError if no keys are chosen."""
    if setup.config.top_k is None:
        raise PydsaError(f"{setup.config.architecture} has no indexer that chooses keys; record(selection=False) records its experts.")
    if not chooses(setup):
        raise PydsaError("With attention='dense' no keys are chosen: load the model with 'auto' or 'sparse', or record(selection=False).")


class Recorder(Hook):
    """Fills a Recording while a session runs steps.

    What a step wrote counts when the step is complete. Rows of few tokens are collected before they are packed.
    """

    def __init__(self, setup, caches, selection=True, routing=True, scores=False, mass=False, path=None, limit=LIMIT):
        counts(1 << 62, limit=limit)
        routing = routing and bool(facts_of(setup, ()).expert_layers)
        wanted = {"selection": selection, "routing": routing, "scores": scores, "mass": mass}
        if not any(wanted.values()):
            raise PydsaError("Nothing is to be recorded, expected selection, scores or mass, or routing of a model with experts.")
        if scores and not selection:
            raise PydsaError("The scores are those of the selection: record(selection=True, scores=True).")
        if selection or mass:
            _check_choice(setup)
        self.late = not (scores or mass)        # which are computed from values that later ops write over
        self._caches, self._scores, self._mass = caches, scores, mass
        self._layers = {}       # of the names of nodes
        self._index, self._chosen = None, {}        # in a step: a function that makes the Index; what each indexer chose, for the mass
        self._facts = facts = facts_of(setup, [name for name in FIELDS if wanted.get(name)])
        self._choosing, self._routed = facts.choosing_layers if selection or mass else (), facts.expert_layers if routing else ()
        self._selection = selection
        self._limit = limit
        self._room = min(CHUNK, max(1, PENDING // (4 * max(1, len(self._choosing) * (facts.top_k or 0)))))
        self._pending, self._n = self._arrays(self._room), 0    # rows that come one by one, and how many there are
        self._parts, self._positions = {}, None         # arrays of a step of many tokens; the positions of a step that makes a choice
        self._chunks, self._n_bytes = [], 0             # positions and `kept` of all chunks
        self.recording = Recording(facts)
        self.recording._settle = self._flush
        self._path, self._writer = path, None

    def _arrays(self, n):
        """Empty arrays for n tokens."""
        f, kinds = self._facts, OF_TOKENS | {"kept": np.bool_}
        arrays = {name: np.empty(n, dtype) for name, dtype in kinds.items()}
        if self._selection:
            arrays["selection"] = np.empty((len(self._choosing), n, f.top_k), np.int32)
        if self._scores:
            arrays["scores"] = np.empty((len(self._choosing), n, f.top_k), np.float32)
        if self._mass:
            arrays["mass"] = np.empty((f.n_layer, n), np.float32)
        if "routing" in f.fields:
            arrays["experts"] = np.empty((len(self._routed), n, f.n_expert_used), np.uint16)
            arrays["expert_weights"] = np.empty((len(self._routed), n, f.n_expert_used), np.float32)
        return arrays

    def wants(self, node):
        if node.op == "moe_route":
            return bool(self._routed)
        if node.op in ATTENTION:
            return layer_of(node) in self._choosing or self._mass
        # The result of indexer_select is wanted, so that it lasts until the end of a step.
        return layer_of(node) in self._choosing and node.op in ("indexer_select", "top_k")

    def after(self, call):
        op, name = call.node.op, call.node.name
        if call.positions is not self._positions:       # a new step
            self._parts, self._positions, self._chose = {}, call.positions, False
        if name not in self._layers:
            self._layers[name] = layer_of(call.node)
        layer = self._layers[name]
        if op == "moe_route":
            i = layer - self._routed[0]
            self._take("experts", i, call.read(0))
            self._take("expert_weights", i, call.read(1))
        elif op == "indexer_select":        # its choice may be replaced before it is used
            if self._scores:
                self._index = index_of(call, self._caches)
        elif op == "top_k":
            chosen, scores = call.read(0), call.read(1)
            self._choose(layer, chosen, lambda: np.where(chosen >= 0, np.take_along_axis(scores, np.maximum(chosen, 0), axis=1), np.nan))
        else:
            if ATTENTION[op] is not None and layer in self._choosing:
                chosen = call.read(ATTENTION[op])
                self._choose(layer, chosen, lambda: self._index().scores_of(chosen))
            if self._mass and self._chose:
                owner = self._facts.indexed_layers[layer]
                self._take("mass", layer, np.clip(attention_of(call, self._caches).mass(self._chosen[owner]), 0, 1))

    def _choose(self, layer, chosen, scores):
        """Take a layer's choice, int32 [n, k], and what scores() returns."""
        self._chose, i = True, self._choosing.index(layer)
        if self._mass:
            self._chosen[layer] = chosen.copy()
        if self._selection:
            self._take("selection", i, chosen)
        if self._scores:
            scores = scores()
            self._take("scores", i, scores if self._fits(len(chosen)) else (scores, chosen))

    def _fits(self, n):
        """Whether n tokens more fit into the pending chunk."""
        return n <= self._room - self._n

    def _take(self, name, i, rows):
        """Copy the rows of a step in a layer, the i-th that has such rows."""
        n = len(self._positions)
        if n == 1:          # fits always; without slices it takes a third less time
            self._pending[name][i, self._n] = rows[0]
            return
        if self._fits(n):
            self._pending[name][i, self._n:self._n + n] = rows
            return
        for part, start in enumerate(range(0, n, CHUNK)):
            some = slice(start, start + CHUNK)
            if name == "selection":
                packed_rows = packed.pack(rows[some], int(rows[some].max(initial=-1)) + 1)
            elif name == "scores":
                packed_rows = _flat(rows[0][some], rows[1][some])
            else:
                packed_rows = rows[some].astype(self._pending[name].dtype)
            self._parts.setdefault(part, {}).setdefault(name, {})[i] = packed_rows

    def completed(self, ids, positions):
        n = len(ids)
        seen = self._positions is not None and len(self._positions) == n and self._positions[0] == positions[0]     # else of another step
        rows = {"positions": positions, "tokens": ids, "all_keys": not (seen and self._chose), "kept": True}
        if self._mass and not (seen and self._chose):
            self._positions, self._parts = positions, self._parts if seen else {}
            for layer in range(self._facts.n_layer):
                self._take("mass", layer, np.ones(n))
            seen = True
        if self._fits(n):
            for name, values in rows.items():
                self._pending[name][self._n:self._n + n] = values
            self._n += n
            if self._n == self._room:
                self._flush()
        else:
            self._flush()
            with interrupts_held():
                for part, start in enumerate(range(0, n, CHUNK)):
                    chunk = {name: np.broadcast_to(values, n)[start:start + CHUNK].astype(self._pending[name].dtype)
                             for name, values in rows.items()}
                    self._add(chunk | self._packed(self._parts.get(part, {}) if seen else {}, len(chunk["kept"])))
        self._parts, self._positions = {}, None

    def _packed(self, part, n):
        """The arrays of a chunk of n tokens.

        part: {name: {i: rows of the i-th layer}}, without a selection where no choice was made.
        """
        found = {name: np.stack([rows[i] for i in range(len(rows))]) for name, rows in part.items() if name not in ("selection", "scores")}
        if self._scores:
            found["scores"] = np.concatenate([np.empty(0, np.float32), *(rows for _, rows in sorted(part.get("scores", {}).items()))])
        if self._selection:
            empty = packed.pack(np.full((n, 1), -1), 0)
            layers = [part.get("selection", {}).get(i, empty) for i in range(len(self._choosing))]
            width = max(maps.shape[1] for maps, _ in layers)
            found["selection_map"] = np.stack([np.pad(maps, ((0, 0), (0, width - maps.shape[1]))) for maps, _ in layers])
            found["selection_bits"] = np.concatenate([bits for _, bits in layers])
        return found

    def _flush(self):
        """Put the pending rows into a chunk."""
        if self._n:
            with interrupts_held():     # so that no row is lost or comes twice
                n, self._n = self._n, 0
                self._add(self._pending_chunk(n))

    def _pending_chunk(self, n):
        part, chunk = {}, {}
        for name, rows in self._pending.items():
            if rows.ndim == 1:
                chunk[name] = rows[:n].copy()
            elif len(rows):
                part[name] = dict(enumerate(rows[:, :n].copy()))
        for i, rows in part.get("selection", {}).items():
            rows[chunk["all_keys"]] = -1
            if self._scores:
                part["scores"][i] = _flat(part["scores"][i], rows)
            part["selection"][i] = packed.pack(rows, int(rows.max(initial=-1)) + 1)
        return chunk | self._packed(part, n)

    def _add(self, chunk):
        """Append a chunk; the oldest leave where there is no room for them."""
        if self._writer is not None:
            self._writer.add(chunk)
        self._chunks.append({name: chunk[name] for name in ("positions", "kept")})
        if self._writer is not None:
            return
        chunks = self.recording._chunks
        chunks.append(chunk)
        self._n_bytes += _bytes_of(chunk)
        while len(chunks) > 1 and self._n_bytes > self._limit:
            self._n_bytes -= _bytes_of(chunks[0])
            left = int(np.count_nonzero(chunks.popleft()["kept"]))
            del self._chunks[0]
            self.recording.facts = dataclasses.replace(self.recording.facts, n_left=self.recording.n_left + left)

    def cut(self, n):
        """Only the first n tokens of the context remain."""
        self._n = int(np.searchsorted(self._pending["positions"][:self._n], n))
        for chunk in self._chunks:
            chunk["kept"] &= chunk["positions"] < n
        while self._writer is None and self._chunks and not self._chunks[-1]["kept"].any():
            self._n_bytes -= _bytes_of(self.recording._chunks.pop())
            del self._chunks[-1]

    @contextlib.contextmanager
    def running(self):
        """A context in which the session's steps are recorded.

        A file is complete at its end, whatever ends it.
        """
        if self._path is None:
            yield self.recording
            return
        self.recording._settle = self._refuse
        with Writer(self._path, self._facts) as self._writer:
            try:
                yield self.recording
            finally:
                if not self._writer.failed:
                    with interrupts_held():
                        self._flush()
                        self._writer.close(np.concatenate([np.empty(0, np.bool_), *(chunk["kept"] for chunk in self._chunks)]))
                        self.recording._adopt(Reader(self._path))

    def _refuse(self):
        if self._writer.failed:
            raise PydsaError(f"The recording could not be written to {self._path}: there is nothing to read.")
        raise PydsaError(f"The recording is still being written to {self._path}: its arrays can be read after the `with` block.")


def _flat(scores, chosen):
    """The scores of the chosen keys of all tokens in one row, float32."""
    return scores[chosen >= 0].astype(np.float32)


def _bytes_of(chunk):
    return sum(array.nbytes for array in chunk.values())
