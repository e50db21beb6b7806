"""Which type each tensor of a quantized file gets: llama-quantize's file types, by name.

A mix is a list of rules; the first that fits a tensor gives its type. Where rows do not fill the blocks of a type, another takes its place.
The rules are those of llama.cpp (src/llama-quant.cpp) for the tensors of DeepSeek's architectures.
"""
import re
from typing import NamedTuple

from pydsa.quants import TYPES

# What is stored where rows are not a multiple of the type's block of 256
FALLBACK = {**dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
            **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
WANT_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")       # of no use without it
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


class Mix(NamedTuple):
    """The types of a file: rules, and the type of the rest.

    A rule is a place (a name in WHERE), a pattern of tensor names without "blk.N.", and a type.
    """
    file_type: int      # general.file_type
    rest: str
    rules: tuple = ()


class Facts(NamedTuple):
    """What the rules ask about a model."""
    n_layer: int        # with MTP blocks, as llama.cpp counts them
    n_expert: int
    group: int = 1      # query heads for each key and value head
    imatrix: bool = False
    tied: bool = False  # whether the embedding serves as the output


class Place(NamedTuple):
    """A tensor as the rules see it."""
    facts: Facts
    name: str           # without "blk.N."
    layer: int          # -1 outside the layers
    shape: tuple
    nth_v: int = 0      # how many matrices of values come before it, in the order of layers and names
    n_v: int = 0        # how many there are
    nth_down: int = 0   # how many ffn_down matrices come before it


def _more_bits(n, total):
    return n < total // 8 or n >= 7 * total // 8 or (n - total // 8) % 3 == 2


WHERE = {
    "all": lambda p: True,
    "first 1/8": lambda p: p.layer < p.facts.n_layer // 8,
    "first 1/16": lambda p: p.layer < p.facts.n_layer // 16,
    "middle 3/4": lambda p: p.facts.n_layer // 8 <= p.layer < 7 * p.facts.n_layer // 8,
    "ends, every 3rd": lambda p: _more_bits(p.layer, p.facts.n_layer),
    "ends, every 3rd of values": lambda p: _more_bits(p.nth_v, p.n_v),
    "first 2 of values": lambda p: p.nth_v < 2,
    "first 4 of values": lambda p: p.nth_v < 4,
    "first 1/8 of matrices": lambda p: p.nth_down < p.facts.n_layer // 8,
    "8 experts": lambda p: p.facts.n_expert == 8,
    "8 experts, every 3rd": lambda p: p.facts.n_expert == 8 and _more_bits(p.layer, p.facts.n_layer),
    "4 experts or a group": lambda p: p.facts.n_expert >= 4 or p.facts.group >= 4,
    "group": lambda p: p.facts.group >= 4,
    "3-D": lambda p: len(p.shape) == 3 and p.shape[0] > 1,
    "imatrix, first 1/8": lambda p: p.facts.imatrix and p.layer < p.facts.n_layer // 8,
    "no imatrix": lambda p: not p.facts.imatrix,
    "no imatrix, first 1/8": lambda p: not p.facts.imatrix and p.layer < p.facts.n_layer // 8,
}

VALUES, KEYS, QUERIES, OUT, DOWN = r"attn_(qkv|kv_b|v)\.weight", r"attn_k\.weight", r"attn_q\.weight", r"attn_output\.weight", "ffn_down"

# llama-quantize has rules for Mixtral that apply to every model of eight experts.
EIGHT_LOW = (("8 experts", KEYS, "Q4_K"), ("8 experts", OUT, "Q5_K"))
EIGHT_KEYS = (("8 experts", f"{VALUES}|{KEYS}", "Q8_0"),)
EIGHT = (*EIGHT_KEYS, ("8 experts", OUT, "Q5_K"))


def _stock(file_type, rest, *rules, output="Q6_K", eight=EIGHT):
    return Mix(file_type, rest, (("all", r"^output\.weight", output), *eight, *rules))


def _low_bits(file_type, rest, more, *rules):
    """A file type of fewer than three bits.

    more: the type of the embedding and of the first ffn_down matrices.
    """
    return _stock(file_type, rest, ("all", "^token_embd", more), ("4 experts or a group", VALUES, "Q4_K"), ("all", VALUES, more),
                  ("first 1/8 of matrices", DOWN, more), *rules, output="Q5_K", eight=EIGHT_LOW)


MORE_BITS = ("ends, every 3rd of values", VALUES, "Q6_K"), ("ends, every 3rd", DOWN, "Q6_K")
FOUR_BITS = ("group", VALUES, "Q5_K"), ("no imatrix, first 1/8", DOWN, "Q5_K")
TERNARY = ("all", "^token_embd", "Q4_K")
MIXES = {
    "Q1_0": _stock(40, "Q1_0", eight=EIGHT_KEYS),
    "TQ1_0": _stock(36, "TQ1_0", TERNARY, eight=EIGHT_KEYS),
    "TQ2_0": _stock(37, "TQ2_0", TERNARY, eight=EIGHT_KEYS),
    "IQ1_S": _low_bits(24, "IQ1_S", "Q2_K", ("all", OUT, "IQ2_XXS")),
    "IQ1_M": _low_bits(31, "IQ1_M", "Q2_K", ("all", OUT, "IQ2_XXS")),
    "IQ2_XXS": _low_bits(19, "IQ2_XXS", "Q2_K"),
    "IQ2_XS": _low_bits(20, "IQ2_XS", "Q2_K"),
    "IQ2_S": _low_bits(28, "IQ2_XS", "IQ3_S", ("all", OUT, "IQ3_S")),
    "IQ2_M": _low_bits(29, "IQ2_S", "IQ3_S", ("all", OUT, "IQ3_S")),
    "Q2_K": _stock(10, "Q2_K", ("group", VALUES, "Q4_K"), ("all", f"{VALUES}|{DOWN}|{OUT}", "Q3_K")),
    "Q2_K_S": _stock(21, "Q2_K", ("group", VALUES, "Q4_K"), ("first 1/8", DOWN, "Q4_K"), eight=EIGHT_KEYS),
    "IQ3_XXS": _stock(23, "IQ3_XXS", ("group", VALUES, "Q4_K"), ("no imatrix", VALUES, "IQ3_S"), ("all", f"{KEYS}|{QUERIES}", "IQ2_S"),
                      ("no imatrix, first 1/8", DOWN, "Q4_K"), ("no imatrix", DOWN, "Q3_K"), ("all", f"{OUT}|^token_embd", "IQ3_S"),
                      output="Q5_K"),
    "IQ3_XS": _stock(22, "IQ3_S", ("group", VALUES, "Q4_K"), ("all", f"{KEYS}|{QUERIES}", "IQ3_XXS"),
                     ("middle 3/4", "ffn_(gate|up)", "IQ3_XXS")),
    "IQ3_S": _stock(26, "IQ3_S", ("group", VALUES, "Q4_K")),
    "IQ3_M": _stock(27, "IQ3_S", ("all", f"{VALUES}|{OUT}", "Q4_K"), ("first 1/8", DOWN, "Q4_K"), ("8 experts, every 3rd", DOWN, "Q4_K")),
    "Q3_K_S": _stock(11, "Q3_K"),
    "Q3_K_M": _stock(12, "Q3_K", ("first 2 of values", VALUES, "Q5_K"), ("first 1/16", DOWN, "Q5_K"),
                     ("all", f"{VALUES}|{DOWN}|{OUT}", "Q4_K")),
    "Q3_K_L": _stock(13, "Q3_K", ("8 experts", OUT, "Q3_K"), ("all", f"{VALUES}|{DOWN}|{OUT}", "Q5_K"), eight=EIGHT_KEYS),
    "Q4_0": _stock(2, "Q4_0", ("imatrix, first 1/8", DOWN, "Q4_1"), eight=EIGHT_KEYS),
    "Q4_1": _stock(3, "Q4_1", eight=EIGHT_KEYS),
    "IQ4_NL": _stock(25, "IQ4_NL", *FOUR_BITS),
    "IQ4_XS": _stock(30, "IQ4_XS", *FOUR_BITS),
    "Q4_K_S": _stock(14, "Q4_K", ("first 4 of values", VALUES, "Q5_K"), ("first 1/8", DOWN, "Q5_K")),
    "Q4_K_M": _stock(15, "Q4_K", *MORE_BITS),
    "MXFP4_MOE": Mix(38, "Q8_0", (("all", r"^output\.weight", "Q8_0"), ("3-D", "", "MXFP4"))),      # 3-D: also attn_k_b and attn_v_b
    "Q5_0": _stock(8, "Q5_0", ("imatrix, first 1/8", DOWN, "Q5_1"), eight=EIGHT_KEYS),
    "Q5_1": _stock(9, "Q5_1", eight=EIGHT_KEYS),
    "Q5_K_S": _stock(16, "Q5_K", eight=EIGHT_KEYS),
    "Q5_K_M": _stock(17, "Q5_K", *MORE_BITS, eight=EIGHT_KEYS),
    "Q6_K": _stock(18, "Q6_K", eight=EIGHT_KEYS),
    "Q8_0": _stock(7, "Q8_0", output="Q8_0", eight=()),
    "F16": Mix(1, "F16"), "BF16": Mix(32, "BF16"), "F32": Mix(0, "F32"),
}


def rule_type(mix, place, where=WHERE):
    """The type that a mix gives a matrix, wherever its rows would fit."""
    if place.facts.tied and place.name == "token_embd.weight":
        place = place._replace(name="output.weight")
    if place.name == "output.weight" and place.shape[-1] % TYPES[mix.rest].size:
        return "Q8_0"
    return next((kind for at, pattern, kind in mix.rules if re.search(pattern, place.name) and where[at](place)), mix.rest)


def fitting(kind, n):
    """The type itself, or another whose blocks rows of n weights fill."""
    if n % TYPES[kind].size:
        kind = FALLBACK.get(kind, "F16")
    return "F16" if n % TYPES[kind].size else kind


def places(shapes, facts):
    """{name: Place} of tensors, given as {name: shape}."""
    split = {name: re.fullmatch(r"blk\.(\d+)\.(.*)", name) for name in shapes}
    found = {name: Place(facts, match[2] if match else name, int(match[1]) if match else -1, shapes[name]) for name, match in split.items()}
    ordered = sorted(found, key=lambda name: (found[name].layer, name))
    values = [name for name in ordered if re.search(VALUES, name)]
    downs = [name for name in ordered if DOWN in name]
    for group, field in ((values, "nth_v"), (downs, "nth_down")):
        for i, name in enumerate(group):
            found[name] = found[name]._replace(**{field: i}, n_v=len(values))
    return found


KEPT = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight")


def may_be_quantized(name, shape):
    """Whether llama-quantize gives a tensor another type.

    It does for matrices, but not for those of norms and routers.
    """
    dims = len(shape)
    while dims > 1 and shape[len(shape) - dims] == 1:       # ggml leaves out leading dimensions of 1
        dims -= 1
    return dims >= 2 and name.endswith("weight") and not KEPT.search(name)
