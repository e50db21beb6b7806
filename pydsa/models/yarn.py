"""Rotary frequencies with YaRN scaling, and YaRN's softmax scale.

Sources: YaRN, 2023; DeepSeek-V3, section 4.3.
"""
import math
import warnings
from typing import NamedTuple

import numpy as np

from pydsa.errors import GGUFError, UnsupportedModelError
from pydsa.gguf.file import quote

KNOWN_BETAS = (32, 1), (1, 1)       # beta_fast and beta_slow of DeepSeek, and of Kimi K2
MOST = 1e6      # a factor above this, or below its inverse, is taken as damage


class Rope(NamedTuple):
    """The rotary position embedding of a model."""
    freqs: np.ndarray       # float64 [n_rot/2]: radians per position
    magnitude: float        # factor of cosines and sines
    mscale: float           # its square is a factor of the softmax scale


def rope_from_metadata(metadata, prefix, n_rot, n_ctx_train):
    """The Rope of a file, from the keys under prefix.rope."""
    key = f"{prefix}.rope."
    base = metadata.number(key + "freq_base", low=1.001, high=1e15, default=10000.0)
    freqs = base ** (-np.arange(0, n_rot, 2) / n_rot)
    kind = metadata.string(key + "scaling.type", default="linear")
    old_factor = metadata.number(key + "scale_linear", low=0, high=MOST, default=0.0)
    factor = metadata.number(key + "scaling.factor", low=0, high=MOST, default=old_factor) or 1.0
    attn_factor = metadata.number(key + "scaling.attn_factor", low=1 / MOST, high=MOST, default=1.0)
    if factor < 1 / MOST:
        raise GGUFError(f"{metadata.path}: {key}scaling.factor is {factor:g}, expected 0, for none, or at least {1 / MOST:g}.")
    if kind == "none":
        return Rope(freqs, attn_factor, attn_factor)
    if kind == "linear":
        return Rope(freqs / factor, attn_factor, attn_factor)
    if kind != "yarn":
        raise UnsupportedModelError(f"{metadata.path}: {key}scaling.type is {quote(kind)}, expected none, linear or yarn.")
    original = metadata.integer(key + "scaling.original_context_length", low=1, default=n_ctx_train)
    beta_fast = metadata.number(key + "scaling.yarn_beta_fast", low=1 / MOST, high=MOST, default=32.0)
    beta_slow = metadata.number(key + "scaling.yarn_beta_slow", low=1 / MOST, high=MOST, default=1.0)
    log_multiplier = metadata.number(key + "scaling.yarn_log_multiplier", low=0, high=MOST, default=0.0) / 0.1

    if (beta_fast, beta_slow) not in KNOWN_BETAS:
        warnings.warn(f"{metadata.path}: {key}scaling.yarn_beta_fast and _slow are {beta_fast:g} and {beta_slow:g}; "
                      "llama.cpp takes 32 and 1.", stacklevel=2)
    if metadata.number(key + "scaling.yarn_ext_factor", default=1.0) not in (1, -1):      # -1: automatic
        raise UnsupportedModelError(f"{metadata.path}: {key}scaling.yarn_ext_factor is set, expected 1.")
    attn_factor *= metadata.number(key + "scaling.yarn_attn_factor", low=1 / MOST, high=MOST, default=1.0)

    def g(m):       # YaRN's mscale
        return 1 + 0.1 * m * math.log(factor) if factor > 1 else 1.0

    if log_multiplier == 0:
        attention = g(1)
    elif prefix == "deepseek2":     # its mscale equals its mscale_all_dim, whatever that is
        attention = 1.0
    else:
        attention = g(1) / g(log_multiplier)
    attention *= attn_factor
    return Rope(_yarn(freqs, base, factor, original, beta_fast, beta_slow), attention, attention * g(log_multiplier))


def _yarn(freqs, base, factor, original, beta_fast, beta_slow):
    """The frequencies with YaRN's scaling.

    Frequencies with many turns in the original context are kept, those with few are divided by the factor, with a ramp between.
    """
    n_rot = 2 * freqs.size

    def dimension(turns):       # of the frequency with this number of turns in the original context
        return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(dimension(beta_fast))), min(n_rot - 1, math.ceil(dimension(beta_slow)))
    keep = 1 - np.clip((np.arange(freqs.size) - low) / max(0.001, high - low), 0, 1)
    return freqs * ((1 - keep) / factor + keep)
