"""Sample the next token from logits.

    token = Sampler(Sampling(temperature=0.7, seed=1)).pick(logits, history)

The steps, their order and their formulas are those of llama.cpp: biases, penalties, top_k, top_p, min_p, temperature, a draw.
"""
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Sequence

import numpy as np

from pydsa.errors import DamagedWeightsError, PydsaError

SHOWN = 8       # biases that are shown one by one


@dataclass(frozen=True)
class Sampling:
    """The options of sampling.

    Raises PydsaError for a value of the wrong type or out of range.
    """

    temperature: float = 0.8            # 0: greedy, always the likeliest token
    top_k: int = 40                     # keep the k likeliest tokens; 0 or -1: all
    top_p: float = 0.95                 # keep the likeliest tokens that together have this probability; 1: all
    min_p: float = 0.05                 # drop tokens less likely than this fraction of the likeliest; 0: none
    repeat_penalty: float = 1.0         # for recent tokens: divide positive logits, multiply negative ones; 1: none
    repeat_last_n: int = 64             # the number of recent tokens, for all penalties; -1: all, 0: none
    frequency_penalty: float = 0.0      # subtract this for each time that a recent token occurs
    presence_penalty: float = 0.0       # subtract this once from a recent token
    seed: int | None = None             # the same seed gives the same draws; None: a new seed every time
    logit_bias: Mapping | None = None   # token id -> what is added to its logit; -inf or False: the token is never picked

    def __repr__(self):
        """The options that decide, and others where they are not the default.

        Of a long logit_bias there is only the length.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        told = ("temperature",) if self.temperature == 0 else ("temperature", "top_k", "top_p", "min_p")
        parts = [f"{f.name}={fields[f.name]!r}" for f in dataclasses.fields(self)
                 if f.name != "logit_bias" and (f.name in told or fields[f.name] != f.default)]
        if self.logit_bias is not None:
            n = len(self.logit_bias)
            parts.append(f"logit_bias={self.logit_bias!r}" if n <= SHOWN else f"logit_bias=<{n} tokens>")
        return f"Sampling({', '.join(parts)})"

    def __post_init__(self):
        self._require("temperature", 0)
        self._require("top_k", -1, integer=True)
        self._require("top_p", 0, 1)
        self._require("min_p", 0, 1)
        self._require("repeat_penalty", 0, open_low=True)
        self._require("repeat_last_n", -1, integer=True)
        self._require("frequency_penalty")
        self._require("presence_penalty")
        if self.seed is not None:
            self._require("seed", 0, integer=True)
        if self.logit_bias is not None:
            self._check_bias()

    @property
    def penalizes(self):
        """Whether the choice depends on the text so far."""
        return self.repeat_last_n != 0 and (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @property
    def needs_host(self):
        """Whether a device cannot pick the token, as it changes no logits."""
        return self.penalizes or bool(self.logit_bias)

    def check_vocabulary(self, n_vocab):
        """Raise PydsaError if logit_bias has an id that is not in the vocabulary."""
        if self.logit_bias and (greatest := max(self.logit_bias)) >= n_vocab:
            raise PydsaError(f"logit_bias has the token {greatest}, expected ids from 0 to {n_vocab - 1}")

    def _check_bias(self):
        """Check that logit_bias has ids as keys, and numbers or False."""
        if not isinstance(self.logit_bias, Mapping):
            raise PydsaError(f"logit_bias is {self.logit_bias!r:.80}, expected a dict of token ids and numbers")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise PydsaError(f"logit_bias has the token {token!r:.80}, expected a token id")
            number = isinstance(bias, (int, float, np.integer, np.floating)) and bias is not True
            if not number or not _is_finite(bias) and bias != -math.inf:
                raise PydsaError(f"logit_bias of token {token} is {bias!r:.80}, expected a number, or -inf or False to ban the token")

    def _require(self, name, low=-math.inf, high=math.inf, integer=False, open_low=False):
        """Check that an option is a finite number, low <= value <= high."""
        value = getattr(self, name)
        kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
        number = isinstance(value, kinds) and not isinstance(value, bool) and _is_finite(value)
        if not number or not low <= value <= high or (open_low and value == low):
            bounds = [f"{'above' if open_low else 'from'} {low}"] if low > -math.inf else []
            bounds += [f"to {high}"] if high < math.inf else []
            kind = "an integer" if integer else "a number"
            raise PydsaError(" ".join([f"{name} is {value!r:.80}, expected {kind}", *bounds]))


def sampling_of(tokenizer, options):
    """The Sampling with these options, a dict of its fields.

    logit_bias may have texts as keys, and then holds for each of a text's tokens; the texts of control tokens are these tokens. Raises
    PydsaError for options that are not valid, and for ids that are not in the vocabulary.
    """
    bias = options.get("logit_bias")
    if isinstance(bias, Mapping):
        ids = {}
        for token, value in bias.items():
            tokens = tokenizer.encode(token, parse_special=True) if isinstance(token, str) else [token]
            if not tokens:
                raise PydsaError("logit_bias has an empty text, expected texts of tokens, or token ids.")
            ids |= dict.fromkeys(tokens, value)
        options = options | {"logit_bias": ids}
    sampling = Sampling(**options)
    sampling.check_vocabulary(tokenizer.n_vocab)        # before a long prompt is read
    return sampling


class Picked(NamedTuple):
    """A token that was sampled where the logits are, and the bounds of these."""
    token: int
    greatest: float
    least: float


class Sampler:
    """Picks tokens with the options of a Sampling; None: its defaults.

    It holds the state of the random number generator.
    """

    def __init__(self, sampling: Sampling | None = None):
        self.sampling = Sampling() if sampling is None else sampling
        self._random = np.random.default_rng(self.sampling.seed)
        biases = self.sampling.logit_bias or {}
        self._biased = np.fromiter(biases, np.int64, len(biases))
        self._most_biased = max(biases, default=-1)
        self._biases = np.array([-math.inf if bias is False else bias for bias in biases.values()], np.float64)
        self._kept = {}         # dtype -> memory for logits that are changed: fresh memory would cost a page fault every 4 KiB

    def pick(self, logits: np.ndarray, history: Sequence[int] = (), allowed: np.ndarray | None = None) -> int:
        """The next token id, an int.

        logits: floats [n_vocab]. history: the ids of the text so far, with the prompt. allowed: the tokens that may be picked, bool
        [n_vocab], before all else; None: all. Raises PydsaError if the greatest logit is not finite, if all tokens are banned, or if the
        history or logit_bias has ids that are not in the vocabulary.
        """
        sampling = self.sampling
        logits = self._only(np.asarray(logits), allowed)
        if self._biased.size and sampling.temperature == 0 and not sampling.penalizes:
            likeliest = self._clearly_likeliest(logits)
            if likeliest is not None:
                return likeliest
        logits = self._penalize(self._bias(logits), history)
        likeliest = int(logits.argmax())        # of equal logits the lowest index; of a NaN, if there is any
        greatest = logits[likeliest]
        if greatest == -math.inf and self._biased.size:     # the logits themselves were checked
            raise PydsaError("logit_bias bans every token that the model can pick, expected one to be left")
        self.check(greatest)
        if sampling.temperature == 0:
            return likeliest
        ids = top_k(logits, sampling.top_k)
        ids = ids[:_n_top_p(_softmax(logits[ids]), sampling.top_p)]
        if sampling.min_p > 0:
            ids = ids[logits[ids] >= greatest + math.log(sampling.min_p)]
        cumulated = np.cumsum(_softmax(logits[ids], sampling.temperature))
        drawn = np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])

    def state(self):
        """What restored() makes an equal Sampler of, as JSON can hold it."""
        fields = dataclasses.asdict(self.sampling) | {"logit_bias": [[int(token), float(-math.inf if bias is False else bias)]
                                                      for token, bias in (self.sampling.logit_bias or {}).items()]}
        return {"sampling": {key: value.item() if isinstance(value, np.generic) else value for key, value in fields.items()},
                "random": self.random}

    @property
    def random(self):
        """The state of the random number generator, a part of state()."""
        return self._random.bit_generator.state

    @classmethod
    def restored(cls, state):
        """The Sampler of a state().

        Raises PydsaError for one that cannot be.
        """
        try:
            sampler = cls(Sampling(**state["sampling"] | {"logit_bias": dict(state["sampling"]["logit_bias"]) or None}))
            sampler._random.bit_generator.state = state["random"]
        except (KeyError, TypeError, ValueError) as error:
            raise PydsaError(f"the state of a sampler is damaged ({error!r})") from error
        return sampler

    def follow(self):
        """Draw as pick() does where another Sampler of the same state picks."""
        if self.sampling.temperature != 0:
            self._random.random()

    def check(self, greatest):
        """Raise DamagedWeightsError if the greatest logit is not finite."""
        if not math.isfinite(greatest):
            raise DamagedWeightsError(f"the greatest of the logits is {greatest}, expected a finite number: "
                                      "the weights are damaged, or a computation overflowed")

    def settings(self, most):
        """The settings for a device that picks from up to `most` tokens.

        They are top_k (0: greedy), top_p, min_p, temperature and a random number from 0 to 1. None if the device cannot pick the token,
        as penalties and biases change logits, or as there are more tokens to pick from.
        """
        sampling = self.sampling
        if most == 0 or sampling.needs_host:
            return None
        if sampling.temperature == 0:
            return 0, 1.0, 0.0, 1.0, 0.0
        if not 0 < sampling.top_k <= most:
            return None
        return sampling.top_k, sampling.top_p, sampling.min_p, sampling.temperature, self._random.random()

    def _only(self, logits, allowed):
        """The logits, with -inf for tokens that are not allowed."""
        if allowed is None:
            return logits
        if not allowed.any():
            raise PydsaError("the constraint allows no token, expected at least one: it cannot be fulfilled")
        self.check(logits.max())            # damaged logits, before a ban can hide them
        most = self._copied(allowed, logits.dtype)      # +inf or -inf for each, which is several times as fast as np.where
        most -= 0.5
        most *= math.inf
        return np.minimum(logits, most, out=most)

    def _copied(self, values, dtype):
        """The values as another dtype, in memory that the next pick() uses again."""
        dtype = np.dtype(dtype)
        if (copy := self._kept.get(dtype)) is None or len(copy) != len(values):
            copy = self._kept[dtype] = np.empty(len(values), dtype)
        np.copyto(copy, values)
        return copy

    def _clearly_likeliest(self, logits):
        """The likeliest token, where biases change nothing; None elsewhere.

        No bias is its own, or raises another token to it: logits need not be copied then.
        """
        if len(logits) <= self._most_biased:
            self.sampling.check_vocabulary(len(logits))
        likeliest = int(logits.argmax())
        greatest = logits[likeliest]
        is_biased = likeliest in self.sampling.logit_bias
        if is_biased or not math.isfinite(greatest) or (logits[self._biased] + self._biases).max() >= greatest:
            return None
        return likeliest

    def _bias(self, logits):
        """Add the biases to the logits of their tokens."""
        if self._biased.size == 0:
            return logits
        self.sampling.check_vocabulary(len(logits))
        self.check(logits.max())            # damaged logits, before a ban can hide them
        logits = self._copied(logits, np.float64)
        logits[self._biased] += self._biases
        return logits

    def _penalize(self, logits, history):
        """Apply the penalties to the logits of recent tokens.

        logit -> (logit / repeat if logit > 0 else logit * repeat) - count * frequency - presence
        """
        sampling = self.sampling
        n = len(history) if sampling.repeat_last_n < 0 else min(sampling.repeat_last_n, len(history))
        if n == 0 or not sampling.penalizes:
            return logits
        repeat, frequency, presence = map(float, (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty))
        seen, counts = np.unique(np.asarray(history[-n:], dtype=np.int64), return_counts=True)
        if seen[0] < 0 or seen[-1] >= len(logits):
            raise PydsaError(f"the history has ids from {seen[0]} to {seen[-1]}, expected 0 to {len(logits) - 1}")
        logits = self._copied(logits, np.float64)
        scaled = np.where(logits[seen] > 0, logits[seen] / repeat, logits[seen] * repeat)
        logits[seen] = scaled - counts * frequency - presence
        return logits


def _is_finite(number):
    """Whether a number is finite as float64; some ints are too large."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def top_k(logits, k):
    """The indices of the k greatest logits, or of all for k = 0, int [k].

    Greater logits come first, and of equal ones the lowest index. None may be NaN. Those of -inf may be left out.
    """
    if not 0 < k < len(logits):
        return np.argsort(-logits, kind="stable")
    least = _least(logits, k)
    candidates = np.flatnonzero(logits >= least if least > -math.inf else logits > least)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:k]]


def _least(logits, k):
    """A number that at least k of the logits reach, and hardly more.

    Each column of a table of the logits has a greatest one, and the k-th of these is such a number. It takes one fast pass.
    """
    width = max(16 * k, 1024)
    rows = len(logits) // width
    if rows < 4:
        return np.partition(logits, len(logits) - k)[len(logits) - k]
    greatest = logits[:rows * width].reshape(rows, width).max(axis=0)
    return np.partition(greatest, width - k)[width - k]


def _softmax(logits, temperature=1.0):
    """The softmax exp((l - max l) / t) / sum, float64 [n], for l[0] = max l.

    Temperatures below 1e-200 are the same as that: the quotients stay finite, and floats that differ do so by more.
    """
    weights = np.exp((logits.astype(np.float64) - logits[0]) / max(temperature, 1e-200))
    return weights / weights.sum()


def _n_top_p(probabilities, p):
    """How many of the first probabilities sum to p, at least one."""
    if p >= 1:
        return len(probabilities)
    return int(np.searchsorted(np.cumsum(probabilities), p, side="left")) + 1


def log_probabilities(logits: np.ndarray, token: int, n: int = 0):
    """How likely a token was -> (log-probability, [(id, log-probability)]).

    The list has the n likeliest tokens, the likeliest first. They are those of the model's logits, [n_vocab], without what a Sampler does
    to them; natural logarithms, float, summed in float64. A token that the model never picks has -inf.
    """
    wide = logits.astype(np.float64)
    greatest = wide.max()
    total = greatest + math.log(np.exp(wide - greatest).sum())
    likeliest = top_k(logits, min(n, len(logits)))[:n] if n else ()
    return float(wide[token] - total), [(int(i), float(wide[i] - total)) for i in likeliest]
