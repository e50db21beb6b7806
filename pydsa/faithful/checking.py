"""Whether a model's sparse attention is right: what `pydsa faithful` reports.

A text is run once with the model's choices of keys, where every layer is compared with the definition (definition.py), and beside it with
attention to all keys, with float32 caches, and on the reference. verdicts.py says in words what was found.
"""
import copy
import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from pydsa import DEMO, load_tokenizer
from pydsa.errors import NOT_FINITE, DamagedWeightsError, PydsaError
from pydsa.executor.hooks import Hook
from pydsa.executor.plan import check_memory
from pydsa.faithful.against import LogitsAgainst, Versus
from pydsa.faithful.choices import TOGETHER, Tally, masks
from pydsa.faithful.measures import SPARSE, Probe
from pydsa.faithful.verdicts import REFERENCE, findings
from pydsa.model import compile_for
from pydsa.stepping import check_ids

AT_ONCE = 512           # tokens of a step, whose logits of two runs are kept
DECODED = TOGETHER      # tokens at the end that run one by one, as in generation
SMALL = 50_000_000      # weights of a model that the reference runs without being asked
ROWS = 64               # rows of logits that are compared together


@dataclasses.dataclass
class Report:
    """What was found; faithful is False if something is wrong.

    model, tokens, top_k, kv_type, index_type, device: what was run. layers: a dict for each layer, depths: a dict for each range of
    positions, runs: a dict for each other run of the text. findings: verdicts.Finding, which tell of them in words.
    """
    model: str
    tokens: int
    looked_at: int
    top_k: int
    kv_type: str
    index_type: str
    device: str
    layers: list
    depths: list
    runs: list
    against: dict | None
    findings: list

    @property
    def faithful(self):
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self):
        """The names of findings that are wrong."""
        return [finding.name for finding in self.findings if finding.verdict == "wrong"]

    def as_dict(self):
        """All of it, of types that JSON has."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _finite({"faithful": self.faithful, **fields, "findings": [finding._asdict() for finding in self.findings]})


def _finite(value):
    """A value of lists and dicts with None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Choices(Hook):
    """Keep what attention reads at some positions.

    kept: {layer: {position: int32 [k]}}.
    """

    def __init__(self, at):
        self._at, self.kept = at, {}

    def wants(self, node):
        return node.op in SPARSE

    def after(self, call):
        here = np.isin(call.positions, self._at)
        if here.any():
            layer = int(call.node.name.rpartition("-")[2])
            self.kept.setdefault(layer, {}).update(zip(call.positions[here].tolist(), call.read(3)[here].copy()))


def places(n_tokens, top_k, samples, decoded=DECODED):
    """The positions to look at, int64, ascending.

    They are blocks of TOGETHER neighbours, from the first token that has more than top_k keys to the last, one block before these, and the
    last `decoded` tokens.
    """
    blocks = max(1, samples // TOGETHER - 2)
    starts = np.linspace(top_k, max(top_k, n_tokens - decoded - TOGETHER), blocks).astype(int)
    found = np.concatenate([*(np.arange(start, start + TOGETHER) for start in (max(0, top_k - TOGETHER), *starts)),
                            np.arange(n_tokens - decoded, n_tokens)])
    return np.unique(found[(found >= 0) & (found < n_tokens)])


def text_ids(path, text=None, against=None, length=None):
    """The token ids to run with the model in a file, a list.

    text: a str; None: the tokens of `against`, if it has all from the first on, else the demo's notes. length: how many ids at most.
    """
    if text is None and against is not None and against.tokens is not None and against.positions[-1] == against.positions.size - 1:
        return against.tokens[:length].tolist()
    if text is None:
        text = Path(DEMO).with_name("notes.txt").read_text(encoding="utf-8").rstrip("\n")
    tokenizer = load_tokenizer(os.path.expanduser(path))
    return tokenizer.encode(text, tokenizer.add_bos)[:length]


def reference_tokens(model, n_tokens):
    """How many of n_tokens the reference can run without a long wait.

    None of them for a large model, as the reference keeps weights as float32, and takes long. It is no error to run more.
    """
    n_weights = sum(math.prod(tensor.shape) for tensor in model.setup.file.tensors.values())
    if model.top_k is None or n_weights > SMALL or model.top_k > 1024:
        return 0
    return min(n_tokens, max(3 * model.top_k, model.top_k + 4 * TOGETHER))


def check(model, text, samples=256, against=None, reference=None, save=None, progress=None):
    """Run a text, and report whether the model's sparse attention is right.

    model: a Model with attention="auto". text: a str, or token ids. samples: tokens at which layers are compared with the definition.
    against: an against.Against, of another implementation. reference: a Model of the same file on the reference device, which runs as many
    tokens as its context holds; None: it is left out. save: a path for a Recording of the choices and experts.
    progress(done, total[, name]) is called with numbers of kernels that are compiled, and then of tokens.

    Returns a Report. Raises PydsaError if the model has no indexer, if the text is too short for a choice, or if `against` or `reference`
    belong to another model or text; OutOfMemoryError if what the layers leave does not fit in memory.
    """
    ids = check_ids(model.tokenize(text) if isinstance(text, str) else text, model.config.n_vocab)
    check_possible(model.setup, ids.size)
    _check_arguments(model, ids, samples, reference)
    if against is not None:
        against.check(ids, model.config)
    positions = places(ids.size, model.top_k, samples)
    check_memory(Probe.bytes_for(model.config, ids.size), f"What {ids.size} tokens leave in each layer, to compare it with the definition")
    runs = _Runs(model, ids, positions, against, reference, progress)
    if save is None:
        runs.all(progress)
    else:
        with runs.session.record(selection=True, routing=bool(model.config.n_expert), path=save):
            runs.all(progress)
    fields = dict(model=model.config.name, tokens=int(ids.size), looked_at=int(positions.size), top_k=model.top_k, kv_type=model.kv_type,
                  index_type=model.index_type, device=model.setup.device_name, layers=runs.layers(), depths=runs.depths(),
                  runs=runs.other_runs(), against=runs.against())
    return Report(**fields, findings=findings(fields, model.config, runs.loss))


def check_possible(setup, n_tokens):
    """Raise PydsaError if a text of so many tokens cannot tell anything.

    setup: a setup.Setup. It is known before any weights are read.
    """
    config = setup.config
    if config.top_k is None:
        raise PydsaError(f"{setup.file.metadata.path}: {config.architecture} has no indexer, so there is no sparse attention to check.")
    if setup.attention != "auto":
        raise PydsaError(f"The model was loaded with attention {setup.attention!r}, expected 'auto', which has both forms to compare.")
    least = config.top_k + 2 * TOGETHER
    if n_tokens < least:
        raise PydsaError(f"The text has {n_tokens} tokens, and with a top_k of {config.top_k} a choice is made from {config.top_k + 1} on: "
                         f"give a text of at least {least} tokens, or a smaller --dsa-top-k.")


def _check_arguments(model, ids, samples, reference):
    if not isinstance(samples, int) or samples < 2 * TOGETHER:
        raise PydsaError(f"samples is {samples!r}, expected at least {2 * TOGETHER}.")
    if ids.size > model.n_ctx:
        raise PydsaError(f"The text has {ids.size} tokens, and the context holds {model.n_ctx}; load the model with a larger n_ctx.")
    if reference is not None and (reference.metadata.path, reference.top_k) != (model.metadata.path, model.top_k):
        raise PydsaError(f"The reference is {reference.metadata.path} with a top_k of {reference.top_k}, expected {model.metadata.path} "
                         f"with {model.top_k}.")


def _session_with(model, progress=None, **changes):
    """A session of a model, in which some attributes of its Setup are others.

    It has the weights of the model. progress(done, total, name) is called before kernels are compiled for it.
    """
    other, setup = copy.copy(model), copy.copy(model.setup)
    vars(setup).update(changes)
    other.setup = setup

    for backend in model.runner.backends.values():
        compile_for(model.runner, setup, backend, progress)
    return other.session()


class _Runs:
    """The runs of one text side by side, and what they differ in."""

    def __init__(self, model, ids, positions, against, reference, progress):
        self._model, self._ids, self._positions = model, ids, positions
        others = {} if against is None else {"against": against.choice}
        self.probe = Probe(model, positions, ids.size, others)
        self.session = model.session()
        self._against, self._versus = against, None if against is None else Versus(against)
        self._logits = LogitsAgainst(against) if against is not None and against.logits is not None else None
        self.session.hooks = (self.probe, *([] if against is None else [self._versus]))
        self._dense = _session_with(model, progress, schedule=model.setup.schedule.all_keys())
        self._others = {}       # name -> (Session, tokens that it runs)
        if (model.kv_type, model.index_type) != ("f32", "f32"):
            self._others["float32 caches"] = _session_with(model, progress, kv_type="f32", index_type="f32"), ids.size
        if reference is not None:
            self._others[REFERENCE] = reference.session(), min(ids.size, reference.n_ctx)
        self._seen = {name: _Choices(positions) for name in self._others}
        for name, (session, _) in self._others.items():
            session.hooks = (self._seen[name],)
        self._compared = {name: _Compared(ids) for name in ("dense", *self._others)}

    def all(self, progress):
        """Run everything."""
        last, step = self._ids.size - DECODED, min(AT_ONCE, self._model.n_ubatch)
        edges = sorted({*range(0, last, step), *range(last, self._ids.size + 1), *(n for _, n in self._others.values())})
        for start, stop in zip(edges, edges[1:]):
            if progress is not None:
                progress(start, self._ids.size)
            self.probe.later = start >= last
            self._step(start, stop)
        self.probe.look()

    def _step(self, start, stop):
        ids, positions = self._ids[start:stop], np.arange(start, stop)
        sparse = self.session.logits(ids)
        if self._logits is not None:
            self._logits.add(positions, sparse)
        self._compared["dense"].add(positions, sparse, self._dense.logits(ids))
        for name, (session, n) in self._others.items():
            if stop <= n:
                self._compared[name].add(positions, sparse, session.logits(ids))

    @property
    def loss(self):
        """The mean loss of the text's tokens, in nats."""
        return float(self._compared["dense"].loss[0, :-1].mean())

    def layers(self):
        """A dict for each layer."""
        rows = []
        for il, layer in enumerate(self.probe.layers):
            own, mass = layer.own, {name: float(np.mean(shares)) for name, shares in layer.mass.items()}
            rows.append({
                "layer": il, "chooser": layer.chooser, "keys": own.keys, "recall": own.recall, "wrong_keys": own.far,
                "rounded_keys": own.differing - own.far, "worst": own.worst, "first_wrong": own.first, "malformed": own.malformed,
                "other_than_shared": layer.other_than_shared if layer.chooser != il else None, "like": own.likeness(),
                "recall_of_cached_keys": layer.exact.recall if layer.chooser == il else None,
                "tied": float(np.mean(layer.tied)) if layer.tied else None,
                "decided_by_ties": float(np.mean(layer.decided)) if layer.decided else None,
                "near": float(np.mean(layer.near)) if layer.near else None,
                "mass": mass["chosen"], "mass_of_best": mass["best"], "mass_of_newest": mass["newest"], "mass_of_random": mass["random"],
                "attention_error": layer.error / layer.size if layer.size else None,
                "together": float(np.mean(layer.unions)) if layer.unions else None})
        return rows

    def depths(self):
        """A dict for each range of positions: sparse beside dense attention."""
        edges, top_k, n = [0], self._model.top_k, self._ids.size
        while edges[-1] < n:
            edges.append(max(top_k, 2 * edges[-1]))
            if edges[-1] > top_k and edges[-1] + edges[-1] // 4 > n:      # a short rest belongs to the range before
                edges[-1] = n
        return [{"from": first, "to": last - 1, **self._compared["dense"].of(slice(first, last))} for first, last in zip(edges, edges[1:])]

    def other_runs(self):
        """A dict for each other run that chooses keys."""
        rows = []
        for name, (_, n) in self._others.items():
            shares = [self._recall(name, il) for il in range(self._model.config.n_layer)]
            rows.append({"run": name, "tokens": n, "recall": [float(share) for share in shares],
                         **self._compared[name].of(slice(min(n, self._model.top_k) if n > self._model.top_k else 0, n))})
        return rows

    def _recall(self, name, il):
        """The share of a run's keys of a layer that the session chose too."""
        theirs, ours = self._seen[name].kept.get(il, {}), self.probe.choices[il]
        at = [position for position in theirs if position in ours and position >= self._model.top_k]
        if not at:
            return np.nan
        mine, other = (masks(np.stack([rows[position] for position in at]), self._ids.size) for rows in (ours, theirs))
        return (mine & other).sum() / other.sum()

    def against(self):
        """What another implementation's file differs in, or None."""
        if self._against is None:
            return None
        found = {"file": str(self._against.path), "tokens": int((self._against.positions < self._ids.size).sum()), "layers": [],
                 "logits": None}
        for il in sorted(self._versus.shares):
            both, keys = self._versus.shares[il]
            tally = self.probe.layers[il].others.get("against", Tally())
            found["layers"].append({
                "layer": il, "recall": both / keys, "first_other": self._versus.differs.get(il), "looked_at": tally.tokens,
                "wrong_keys": tally.far, "worst": tally.worst, "malformed": tally.malformed, "first_wrong": tally.first,
                "like": tally.likeness()})
        if self._logits is not None and self._logits.n:
            found["logits"] = self._logits.figures(self._model.top_k)
        return found


class _Compared:
    """Logits of two runs, token by token.

    loss: [2, n], those of the session and of the other run. kl: [n], of the other run to the session. agree: [n], whether the likeliest
    token is the same.
    """

    def __init__(self, ids):
        self._ids = ids
        self.loss, self.kl, self.agree = np.full((2, ids.size), np.nan), np.full(ids.size, np.nan), np.zeros(ids.size, bool)

    def add(self, positions, ours, theirs):
        """Compare logits [n, n_vocab] of the tokens at some positions.

        Raises DamagedWeightsError if they are not finite.
        """
        for first in range(0, len(positions), ROWS):
            rows, at = slice(first, first + ROWS), positions[first:first + ROWS]
            log_p, log_q = (_log_softmax(logits[rows]) for logits in (ours, theirs))
            if not (np.isfinite(log_p).all() and np.isfinite(log_q).all()):
                raise DamagedWeightsError(NOT_FINITE)
            self.kl[at] = (np.exp(log_q) * (log_q - log_p)).sum(axis=1)
            self.agree[at] = log_p.argmax(axis=1) == log_q.argmax(axis=1)
            followed = at[at + 1 < self._ids.size]
            for i, log in enumerate((log_p, log_q)):
                self.loss[i, followed] = -log[np.arange(followed.size), self._ids[followed + 1]]

    def of(self, part):
        """The figures of a slice of positions."""
        loss = self.loss[:, part]
        losses = [float(np.nanmean(row)) if np.isfinite(row).any() else None for row in loss]
        return {"same_top": float(self.agree[part].mean()), "kl": float(np.nanmean(self.kl[part])), "loss": losses[0],
                "loss_other": losses[1]}


def _log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
