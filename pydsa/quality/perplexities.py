"""What measuring perplexity gives: figures with their errors, rows and tables.

All logarithms are natural. An error is the standard error of a mean, as if the tokens were independent, as llama.cpp's is.
"""
import math
import os
import sys

import numpy as np

from pydsa.bench import markdown
from pydsa.selections.selector import name_of

MOST_LOG = math.log(sys.float_info.max)
PERCENTILES = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)
AGAINST = ("base_ppl", "base_ppl_error", "correlation", "ln_ratio", "ln_ratio_error", "ratio", "ratio_error", "difference",
           "difference_error", "kl", "kl_error", "kl_max", *(f"kl_{p:g}%" for p in PERCENTILES), "kl_min", "dp", "dp_error", "dp_max",
           *(f"dp_{p:g}%" for p in PERCENTILES), "dp_min", "dp_rms", "dp_rms_error", "same_top", "same_top_error")      # columns


class Perplexity:
    """The perplexity of a text under one setting.

    settings: {name: value} of the model and its attention. chunks: int32 [n_chunks, n_ctx], the tokens of all chunks. first: the first
    token of a chunk whose prediction is scored. stride: as for quality.perplexity(). base: what it is compared with, in words; None:
    nothing. The arrays below have a row for each complete chunk and a column for each prediction that is scored, n_ctx - 1 - first.
    """

    def __init__(self, session, chunks, first, stride, base):
        setup = session.setup
        chooses = setup.config.top_k is not None and setup.attention != "dense"
        self.settings = {"model": str(setup.file.metadata.path), "device": setup.device_name, "precision": setup.precision,
                         "attention": setup.attention,
                         "top_k": setup.config.top_k if chooses else None, "kv_type": setup.kv_type,
                         "index_type": setup.index_type if chooses else None,
                         "select": None if session.select is None else name_of(session.select)}
        self.chunks, self.first, self.stride, self.base = chunks, first, stride, base
        self._columns = []

    def __repr__(self):
        figures = f"{self.ppl:.4f} ± {self.ppl_error or 0:.4f}" if self.n_tokens else "nothing yet"
        return f"<pydsa.Perplexity {figures}, {self.n_tokens} tokens of {len(self.chunks)} chunks, attention "\
               f"{self.settings['select'] or self.settings['attention']}>"

    def add(self, *arrays):
        """Append a complete chunk.

        arrays: log-probabilities; with a base also the base's, the KL divergences, and whether the likeliest tokens are the same.
        """
        self._columns.append(arrays)

    def _array(self, i):
        if i and self.base is None:
            return None
        return np.array([arrays[i] for arrays in self._columns]).reshape(len(self._columns), self.n_ctx - 1 - self.first)

    @property
    def n_ctx(self):
        """The tokens of a chunk."""
        return self.chunks.shape[1]

    @property
    def n_chunks(self):
        """The number of complete chunks."""
        return len(self._columns)

    @property
    def n_tokens(self):
        """The number of predictions that were scored."""
        return len(self._columns) * (self.n_ctx - 1 - self.first)

    @property
    def targets(self):
        """The tokens that were predicted, int32 [n_chunks, n]."""
        return self.chunks[:self.n_chunks, self.first + 1:]

    @property
    def log_probs(self):
        """Their log-probabilities, float64 [n_chunks, n]."""
        return self._array(0)

    @property
    def base_log_probs(self):
        """Their log-probabilities in the base, or None."""
        return self._array(1)

    @property
    def kl(self):
        """The KL divergences from the base, in nats, or None.

        They are float64 [n_chunks, n].
        """
        return self._array(2)

    @property
    def same_top(self):
        """Whether the likeliest token is the base's, or None.

        It is bool [n_chunks, n].
        """
        return self._array(3)

    @property
    def n_chosen(self):
        """How many predictions tokens made that had more keys than top_k.

        With a session's `select` all tokens have a choice.
        """
        top_k = self.settings["top_k"]
        if self.settings["select"] is not None:
            return self.n_tokens
        return 0 if top_k is None else self.n_chunks * max(0, self.n_ctx - 1 - max(self.first, top_k))

    @property
    def nll(self):
        """The mean negative log-probability."""
        return -float(self.log_probs.mean())

    @property
    def nll_error(self):
        """The standard error of nll; None for a single prediction."""
        return mean_error(self.log_probs)[1]

    @property
    def ppl(self):
        """The perplexity, exp(nll)."""
        return exponential(self.nll)

    @property
    def ppl_error(self):
        """The standard error of ppl; None for a single prediction."""
        return _times(self.nll_error, self.ppl)

    def row(self):
        """All figures as a dict of JSON types; None where there is none."""
        row = self.settings | {"n_ctx": self.n_ctx, "stride": self.stride, "n_chunks": self.n_chunks, "n_tokens": self.n_tokens,
                               "n_chosen": self.n_chosen, "ppl": self.ppl, "ppl_error": self.ppl_error, "nll": self.nll,
                               "nll_error": self.nll_error, "base": self.base}
        return row | (dict.fromkeys(AGAINST) if self.base is None else self._against())

    def _against(self):
        """The columns of AGAINST, by llama.cpp's formulas."""
        mine, other = -self.log_probs, -self.base_log_probs
        difference, difference_error = mean_error(mine - other)
        base_ppl = exponential(other.mean())
        ratio = exponential(difference)
        errors = mean_error(mine)[1], mean_error(other)[1]
        spreads = _times(errors[0], self.ppl), _times(errors[1], base_ppl)
        covariance = None if self.n_tokens < 2 else float(np.cov(mine.ravel(), other.ravel(), ddof=0)[0, 1]) / (self.n_tokens - 1)
        dp = np.exp(-mine) - np.exp(-other)
        square, square_error = mean_error(dp ** 2)
        rms = math.sqrt(square)
        top = float(self.same_top.mean())
        values = {"base_ppl": base_ppl, "base_ppl_error": _times(errors[1], base_ppl),
                  "correlation": covariance / (errors[0] * errors[1]) if covariance is not None and errors[0] and errors[1] else None,
                  "ln_ratio": difference, "ln_ratio_error": difference_error,
                  "ratio": ratio, "ratio_error": _times(difference_error, ratio),
                  "difference": self.ppl - base_ppl, "difference_error": None if covariance is None else _root(
                      spreads[0] * spreads[0] + spreads[1] * spreads[1] - 2 * self.ppl * base_ppl * covariance),
                  **_spread("kl", self.kl), **_spread("dp", dp), "dp_rms": rms,
                  "dp_rms_error": 0.5 / rms * square_error if rms and square_error is not None else None,
                  "same_top": top, "same_top_error": None if self.n_tokens < 2 else math.sqrt(top * (1 - top) / (self.n_tokens - 1))}
        return {name: values[name] for name in AGAINST}


def exponential(x):
    """e to the power of x as a float; infinity for what is greater than all."""
    return math.exp(x) if x < MOST_LOG else math.inf


def mean_error(values):
    """The mean of an array, and its standard error; None for one value."""
    return float(values.mean()), float(values.std()) / math.sqrt(values.size - 1) if values.size > 1 else None


def _times(error, factor):
    return None if error is None else error * factor


def _root(value):
    return math.sqrt(max(0.0, value))


def _spread(name, values):
    """The mean of an array with its error, and its percentiles."""
    mean, error = mean_error(values)
    return {name: mean, f"{name}_error": error, f"{name}_max": float(values.max()), f"{name}_min": float(values.min()),
            **{f"{name}_{p:g}%": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES))}}


def table(rows):
    """Rows of Perplexity.row() as a markdown table, and one of statistics.

    The second has a column for each row that is compared with a base; it is left out where none is.
    """
    several = len({row["model"] for row in rows}) > 1
    text = markdown([({"model": os.path.basename(row["model"])} if several else {}) | _short(row) for row in rows])
    compared = [row for row in rows if row["base"] is not None]
    if not compared:
        return text
    keys = ("top_k", "kv_type", "index_type")
    names = [", ".join([row["select"] or row["attention"], *(str(row[key]) for key in keys if row[key] is not None)])
             for row in compared]
    lines = [{"": label} | {f"{name}{' ' * i}": show(row) for i, (name, row) in enumerate(zip(names, compared))} for label, show in _LINES]
    return f"{text}\nAgainst {compared[0]['base']}:\n\n{markdown(lines)}"


def _short(row):
    cells = {"attention": row["select"] or row["attention"], "top_k": "-" if row["top_k"] is None else str(row["top_k"]),
             "kv": row["kv_type"], "index": row["index_type"] or "-", "tokens": str(row["n_tokens"]),
             "with a choice": f"{row['n_chosen'] / row['n_tokens']:.0%}", "PPL": with_error(row, "ppl", ".4f")}
    if row["base"] is None:
        return cells | dict.fromkeys(("ln(PPL/base)", "KL", "same top", "RMS Δp"), "-")
    return cells | {"ln(PPL/base)": with_error(row, "ln_ratio", ".5f"), "KL": with_error(row, "kl", ".5f"),
                    "same top": with_error(row, "same_top", ".2f", 100, " %"), "RMS Δp": with_error(row, "dp_rms", ".2f", 100, " %")}


def with_error(row, name, form, factor=1, unit=""):
    """A figure of a row with its error, as text: "34.21 ± 0.80"."""
    error = row[f"{name}_error"]
    return _number(row[name] * factor, form) + ("" if error is None else f" ± {error * factor:{form}}") + unit


def _number(value, form):
    """A number as text, where 0 has no sign."""
    text = format(value, form)
    return text.removeprefix("-") if float(text) == 0 else text


def _line(label, name, form, factor=1, unit="", error=True):
    def show(row):
        if row[name] is None:
            return "-"
        return with_error(row, name, form, factor, unit) if error else _number(row[name] * factor, form) + unit
    return label, show


def _percentile_lines(label, name, form, factor=1, unit=""):
    names = ["max", *(f"{p:g}%" for p in PERCENTILES), "min"]
    words = {"max": "maximum", "50%": "median", "min": "minimum"}
    return [_line(f"{label}, {words.get(end, end.replace('%', ' %'))}", f"{name}_{end}", form, factor, unit, False) for end in names]


_LINES = [_line("PPL", "ppl", ".6f"), _line("PPL(base)", "base_ppl", ".6f"),
          _line("correlation of ln PPL and ln PPL(base)", "correlation", ".2f", 100, " %", False),
          _line("ln(PPL/PPL(base))", "ln_ratio", ".6f"), _line("PPL/PPL(base)", "ratio", ".6f"),
          _line("PPL - PPL(base)", "difference", ".6f"),
          _line("KL divergence, mean", "kl", ".6f"), *_percentile_lines("KL divergence", "kl", ".6f"),
          _line("Δp, mean", "dp", ".3f", 100, " %"), *_percentile_lines("Δp", "dp", ".3f", 100, " %"),
          _line("Δp, RMS", "dp_rms", ".3f", 100, " %"), _line("same top", "same_top", ".3f", 100, " %")]
