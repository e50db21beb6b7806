"""The schedule: which variant of a model's graph runs a step.

It also decides when MLA's plain form, with keys and values for each head, takes less work than the absorbed form.
"""
import bisect
import copy
import functools
from typing import NamedTuple

from pydsa.backends.devices import FORMS_BY_TILES, LONGEST_PLAIN
from pydsa.executor.costs import StepSize

# Measured: docs/journal/sparse-attention.md
MHA_TOKENS = 48         # the least tokens of a step for which the plain form can take less time


class Variant(NamedTuple):
    """A way to record a model's graph.

    plain: attention has keys and values for each head, instead of absorbed queries. indexer: None, no indexer runs; "keys", index keys are
    only stored; "indices" or "mask", keys are also chosen, in this form. ends_early: once its caches are written the last layer goes on
    with the rows alone whose logits are wanted, in the absorbed form. head: whether the head follows the last layer; else the rows whose
    logits are wanted are the output.
    """
    plain: bool
    indexer: str | None = None
    ends_early: bool = False
    head: bool = True

    @property
    def chooses(self):
        """Whether layers attend to the keys that their indexers choose."""
        return self.indexer in ("indices", "mask")


VARIANTS = {"mha": Variant(True), "mha+keys": Variant(True, "keys"), "mha+choice": Variant(True, "indices"),
            "dense": Variant(False), "dense+keys": Variant(False, "keys"), "sparse": Variant(False, "indices"),
            "masked": Variant(False, "mask")}


HEAD = "head"       # the name of the graph of the head alone: the last norm and the output matrix, in a stage without the last layer


def ending_early(name):
    """The name of a variant's graph whose last layer ends early."""
    return f"{name}, last rows"


def ends_early(n_tokens, n_outputs):
    """Whether the last layer of a step of n_tokens tokens ends early.

    With as many logits that its plain form could pay it does not.
    """
    return n_outputs < min(n_tokens, MHA_TOKENS)


class Schedule:
    """The variants that a model needs, and the one that runs each step.

    They are for contexts of up to n_ctx tokens, and prompts in ubatches of n_ubatch. attention: the value of `--attention`. With "auto",
    steps up to top_k tokens attend to all keys, which is exact, and later steps to the chosen keys. In both cases a step takes the plain
    form where that is less work, unless one_form: then a token's sums are those of the absorbed form in each step. They are the same for
    all keys and for chosen ones that are all.

    costs: those of both forms where it runs, which only say which of the variants runs a step. There are the variants, and the memory, for
    the longest use of the plain form, whatever the machine.
    """
    costs = FORMS_BY_TILES

    def __init__(self, config, attention, n_ctx, n_ubatch, one_form=False):
        self._config, self._n_ctx, self._n_ubatch = config, n_ctx, n_ubatch
        self._top_k, self._one_form = config.top_k, one_form
        used = [name for name in config.VARIANTS[attention] if self._has_use_of(name, attention)]
        self._beyond = [name for name in used if attention == "auto" and VARIANTS[name].chooses]
        self._up_to_top_k = [name for name in used if name not in self._beyond]
        self.variants = *self._up_to_top_k, *self._beyond

    def _has_use_of(self, name, attention):
        """Whether any step takes this variant."""
        if VARIANTS[name].plain:
            return not self._one_form and self._plain_until(name) > (self._top_k if VARIANTS[name].chooses else 0)
        return name != "sparse" or attention != "auto" or self._n_ctx > self._top_k

    def _plain_until(self, name):
        """The longest context in which ubatches can take a plain variant.

        It is in tokens.
        """
        if VARIANTS[name].chooses:
            return plain_form_until(self._config, self._n_ubatch, self._n_ctx, self._top_k, LONGEST_PLAIN)
        longest = min(self._n_ctx, self._top_k) if VARIANTS[name].indexer else self._n_ctx
        return plain_form_until(self._config, min(self._n_ubatch, longest), longest)

    @functools.cached_property
    def plain_form_until(self):
        """The longest context in which ubatches take MLA's plain form.

        It is in tokens; 0 if they never do.
        """
        return max((self._plain_until(name) for name in self.variants if VARIANTS[name].plain), default=0)

    @property
    def selects(self):
        """Whether there are variants whose layers take a list of keys.

        Others can be made of that list (selections/selector.py).
        """
        return any(VARIANTS[name].indexer == "indices" for name in self.variants)

    def variant(self, n_past, n_tokens, selects=False):
        """The name of the variant for a step of n_tokens after n_past others.

        selects: whether it must be one that takes a list of keys.
        """
        if selects:
            names = [name for name in self.variants if VARIANTS[name].indexer == "indices"]
        else:
            names = self._beyond if self._beyond and n_past + n_tokens > self._top_k else self._up_to_top_k
        chosen = VARIANTS[names[-1]].chooses
        if len(names) > 1 and plain_form_pays(self._config, n_past, n_tokens, self._top_k if chosen else None, self.costs):
            return names[0]
        return names[-1]

    def all_keys(self):
        """A Schedule whose steps attend to all keys, however many there are.

        With `--attention auto`, which has variants for both.
        """
        other = copy.copy(self)
        other._beyond = []
        return other


def plain_form_pays(c, n_past, n_tokens, most=None, costs=FORMS_BY_TILES):
    """Whether MLA's plain form takes less time than the absorbed form.

    c: a model's Config. most: the number of keys that a token chooses, which the absorbed form gathers one by one; None: all keys, and both
    have as many pairs, so that products are compared. costs: a devices.FormCosts. Below MHA_TOKENS tokens the plain form never pays:
    computing keys costs more there than is counted.
    """
    if n_tokens < MHA_TOKENS:
        return False
    size, expansion = StepSize(n_tokens, n_past, {}), c.kv_lora * (c.n_nope + c.n_v)
    plain, per_pair = size.n_kv * expansion + size.pairs(size.n_kv) * (c.n_nope + c.n_rot + c.n_v), 2 * c.kv_lora + c.n_rot
    if most is None:
        return plain < n_tokens * expansion + size.pairs(size.n_kv) * per_pair
    per_pair += costs.gather * (c.kv_lora + c.n_rot) // c.n_head
    return costs.plain * plain < n_tokens * expansion + size.pairs(most) * per_pair


def plain_form_until(c, n_tokens, n_ctx, most=None, costs=FORMS_BY_TILES):
    """The longest context in which the plain form pays for the last n_tokens.

    It is in tokens, n_ctx at most; 0 if there is none.
    """
    n = bisect.bisect(range(n_tokens, n_ctx + 1), 0, key=lambda n_kv: not plain_form_pays(c, n_kv - n_tokens, n_tokens, most, costs))
    return n_tokens + n - 1 if n else 0
