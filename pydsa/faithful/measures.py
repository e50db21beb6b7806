"""A hook that compares what a session computes with the definition.

It keeps the products that keys are made of, and at some tokens looks at each layer: which keys attention read, what it made of them, and
where dense attention of the same queries would look.
"""
import numpy as np

from pydsa.backends.reference import weight
from pydsa.errors import DamagedWeightsError
from pydsa.executor.hooks import Hook
from pydsa.faithful.choices import TOGETHER, Tally, masks, simple_faults, ties
from pydsa.faithful.definition import Attention, Indexer, best, choosers, faults, latents, rule_of
from pydsa.models.stored import key_and_value_heads

SPARSE, DENSE = ("sparse_attention", "mha_sparse_attention"), ("dense_attention", "mha_attention")
PRODUCTS = ("indexer_k_raw", "indexer_q", "indexer_weights", "kv_cmpr_pe", "q", "kqv_out")
LAST = "attn_out"       # the product after a layer's attention: all that is looked at is there


class Layer:
    """What was measured in a layer, as sums over tokens.

    own: the Tally of the session's choice. others: {name: Tally} of choices from elsewhere. exact: the Tally of keys that are chosen from
    rounded index keys, against those from exact ones.
    """

    def __init__(self, chooser):
        self.chooser, self.own, self.exact, self.others = chooser, Tally(), Tally(), {}
        self.other_than_shared = 0      # tokens whose keys are not those of the layer whose choice is shared
        self.tied, self.decided, self.near = [], [], []
        self.mass = {"chosen": [], "best": [], "newest": [], "random": []}
        self.error = self.size = 0.0
        self.unions = []


class Probe(Hook):
    """Measure the layers of a session at some positions.

    model: a Model. positions: int64, those to look at. n_tokens: how many the session will have. others: {name: function(layer, positions)}
    of choices from elsewhere, as against.Against.choice() returns them. later: whether tokens wait until look() is called, which takes
    less time for steps of one token. layers: [Layer]. choices: {layer: {position: row}}, int32 [k].
    """

    def __init__(self, model, positions, n_tokens, others=None):
        self._model, self._config, self._others = model, model.config, others or {}
        self._at = np.zeros(n_tokens, bool)
        self._at[positions] = True
        c = model.config
        self.layers = [Layer(chooser) for chooser in choosers(model.metadata, c.n_layer)]
        self._owners = sorted({layer.chooser for layer in self.layers})
        self._keys = {il: np.empty((n_tokens, c.indexer_head_size), np.float32) for il in self._owners}
        self._latents = [np.empty((n_tokens, c.kv_lora + c.n_rot), np.float32) for _ in self.layers]
        self._now, self._choice, self._here, self.choices = {}, None, {}, [{} for _ in self.layers]
        self.later, self._waiting = False, {}
        self._suspects = {}         # name of a choice -> the first layer in which it has a far key

    @staticmethod
    def bytes_for(config, n_tokens):
        """Bytes that a Probe keeps of n_tokens."""
        owners = len(set(config.indexed_layers))
        return 4 * n_tokens * (owners * config.indexer_head_size + config.n_layer * (config.kv_lora + config.n_rot))

    def wants(self, node):
        name = node.name.rpartition("-")[0]
        return (node.op in (*SPARSE, *DENSE) or name == LAST and node.op == "linear"
                or name in PRODUCTS and node.op in ("linear", "scale", "head_linear", "mha_attention", "mha_sparse_attention"))

    def after(self, call):
        name, _, layer = call.node.name.rpartition("-")
        il, here = int(layer), self._at[call.positions]
        if name == "indexer_k_raw":
            if il in self._keys:
                self._keys[il][call.positions] = call.read(0).reshape(len(here), -1)
        elif name == "kv_cmpr_pe":
            c, norm = self._config, self._tensor(il, "attn_kv_a_norm.weight", self._config.kv_lora)
            self._latents[il][call.positions] = latents(c, call.read(0).reshape(len(here), -1), norm, call.positions, self._model.kv_type)
        elif not here.any():
            return
        elif name == LAST:
            self._waiting.setdefault(il, []).append((call.positions[here], self._now, self._choice))
            self._now = {}
            if not self.later:
                self.look()
        else:
            if call.node.op in (*SPARSE, *DENSE):
                self._choice = call.read(3)[here].copy() if call.node.op in SPARSE else None
            if name in PRODUCTS:
                self._keep(name, call.read(0)[here], call.node.op == "scale")

    def _keep(self, name, values, scaled):
        """Keep a copy of a product.

        A matrix may have a factor, which multiplies the product later. That of keys' heads multiplies the first values of queries.
        """
        if not scaled:
            self._now[name] = np.array(values)
        elif name != "kqv_out":     # a factor of values' heads is not in the definition's matrix
            kept = self._now[name]
            if kept.size == values.size:
                kept[...] = values.reshape(kept.shape)
            else:
                kept.reshape(len(kept), self._config.n_head, -1)[..., :values.shape[-1]] = values

    def _tensor(self, il, name, *shape):
        return weight(self._model.setup.weights.layer(il)(name, *shape).read())

    def look(self):
        """Measure the layers at the tokens whose products wait for it."""
        for il, waiting in self._waiting.items():
            positions = np.concatenate([positions for positions, _, _ in waiting])
            now = {name: np.concatenate([products[name] for _, products, _ in waiting]) for name in waiting[0][1]}
            chosen = [choice for _, _, choice in waiting]
            self._look(il, positions, now, None if chosen[0] is None else np.concatenate(chosen))
        self._waiting = {}

    def _look(self, il, positions, now, choice):
        """Measure a layer at some tokens; choice: None if all keys are read."""
        layer, n_keys, k = self.layers[il], int(positions[-1]) + 1, self._config.top_k
        if choice is None:
            found = np.arange(n_keys) <= positions[:, None]
            seen = found.any(axis=1)
        else:
            if layer.chooser == il:
                scored = self._scored(il, positions, n_keys, now)
                self._here[il] = *self._score(layer, positions, scored), scored, choice
            found = masks(choice, n_keys)
            seen = (choice >= 0).any(axis=1) & (choice <= positions[:, None]).all(axis=1)
            self._count(il, positions, choice, *self._here[layer.chooser])
            self.choices[il].update(zip(positions.tolist(), choice))
            many = positions >= k
            for first in range(0, int(many.sum()) - TOGETHER + 1, TOGETHER):
                block = np.flatnonzero(many)[first:first + TOGETHER]
                if positions[block[-1]] - positions[block[0]] == TOGETHER - 1:
                    layer.unions.append(found[block].any(axis=0).sum() / k)
        self._attend(il, positions, found, seen, now)

    def _scored(self, il, positions, n_keys, now):
        """A function of a cache type, and a Rule, for a layer's tokens.

        It returns the scores of their keys, and what should be chosen: arrays [n, n_keys].
        """
        c, heads = self._config, self._config.indexer_n_head
        norm = [self._tensor(il, f"indexer.k_norm.{part}", c.indexer_head_size) for part in ("weight", "bias")]
        indexer = Indexer(c, norm)
        q, weights = now["indexer_q"].reshape(len(positions), heads, -1), now["indexer_weights"]
        raw = self._keys[il][:n_keys]

        def scored(kind, rule=None):
            scores = indexer.scores(q, weights, indexer.keys(raw, kind, rule), positions, rule)
            return scores, np.array([best(row, c.top_k) for row in scores])
        return scored

    def _score(self, layer, positions, scored):
        """The scores of rounded keys, and what should be chosen.

        Returns arrays [n, n_keys]. It also counts ties, and the keys that rounding loses. Raises DamagedWeightsError for NaN, of which
        there is no order.
        """
        c, n_keys = self._config, int(positions[-1]) + 1
        (exact_scores, exact), (scores, right) = scored("f32"), scored(self._model.index_type)
        if np.isnan(scores).any():
            raise DamagedWeightsError("the scores of keys are not finite: the weights are damaged, or a computation overflowed")
        many = positions >= c.top_k
        rows = np.where(right, np.arange(n_keys), n_keys)
        choice = np.sort(rows, axis=1)[:, :c.top_k]
        layer.exact.add(np.where(choice == n_keys, -1, choice)[many], positions[many], exact_scores[many], exact[many], c.top_k)
        for i in np.flatnonzero(many):
            equal, decided, near = ties(scores[i, :positions[i] + 1], right[i, :positions[i] + 1])
            layer.tied.append(equal)
            layer.decided.append(decided)
            layer.near.append(near)
        return scores, right

    def _count(self, il, positions, choice, scores, right, scored, shared):
        """Compare the session's choice, and those from elsewhere."""
        layer, k = self.layers[il], self._config.top_k
        many = positions >= k
        if layer.chooser != il:
            layer.other_than_shared += int((choice != shared).any(axis=1).sum())
        claims = {"": (layer.own, np.ones(len(positions), bool), choice)}
        for name, choice_of in self._others.items():
            found = choice_of(il, positions)
            if found is not None and found[0].any():
                claims[name] = layer.others.setdefault(name, Tally()), *found
        for name, (tally, there, choice) in claims.items():
            few = ~many & there     # rows with all keys: only their form counts
            far = bool(tally.add_form(choice[few[there]], positions[few], k))
            at, choice = many & there, choice[many[there]]
            far = tally.add(choice, positions[at], scores[at], right[at], k) or far
            if far and il <= self._suspects.get(name, il):
                self._suspects[name] = il
                if layer.chooser == il and at.any():
                    self._explain(tally, choice, positions[at], scores[at], right[at], lambda *how: scored(*how)[1][at])

    def _explain(self, tally, choice, positions, scores, right, chosen):
        """Count how much a wrong choice is like that of known faults.

        chosen(cache type, Rule): what would be chosen so, masks [n, S].
        """
        for sentence, masks_of in simple_faults(scores, right, positions).items():
            tally.liken(sentence, choice, masks_of)
        for sentence, wrong in faults(rule_of(self._config)).items():
            tally.liken(sentence, choice, chosen("f32" if wrong.scaled else self._model.index_type, wrong))

    def _attend(self, il, positions, found, seen, now):
        """Measure the mass of dense attention, and the error of the outputs.

        found: the keys that are read, masks [n, S]. seen: whether these are keys that a token may see, [n]; else nothing is to compare.
        """
        c, layer, n_keys = self._config, self.layers[il], found.shape[1]
        k_b, v_b = key_and_value_heads(self._model.setup.weights.layer(il), c.n_head, c.kv_lora, c.n_nope, c.n_v)
        attention, rows = Attention(c, weight(k_b.read()), weight(v_b.read())), self._latents[il][:n_keys].astype(np.float64)
        queries = now["q"].reshape(len(positions), c.n_head, -1)
        outputs = now["kqv_out"].reshape(len(positions), c.n_head, c.n_v)
        for i, shares in attention.shares(queries, rows, positions):
            keys, n = np.flatnonzero(found[i]), int(positions[i]) + 1
            if seen[i]:
                expected = attention.outputs(shares[:, keys], rows[keys])
                layer.error += float(((outputs[i] - expected) ** 2).sum())
                layer.size += float((expected ** 2).sum())
            if n > c.top_k:
                mean, k = shares.mean(axis=0)[:n], c.top_k
                layer.mass["chosen"].append(mean[found[i][:n]].sum())
                layer.mass["best"].append(np.partition(mean, -k)[-k:].sum())
                layer.mass["newest"].append(mean[-k:].sum())
                layer.mass["random"].append(k / n)
