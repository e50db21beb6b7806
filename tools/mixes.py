"""The types of a file's tensors: one for all matrices, or a mix.

A mix is a list of rules, and the first that fits a tensor gives its type. A mix is called exact where its rules are those of the program
that writes such files, or were read from a published file, and inferred where they only agree with what is known of one.

Where the rules come from:

    llama.cpp   src/llama-quant.cpp in ggml-org/llama.cpp at 007dbbf, for the tensors of these architectures, with an importance matrix.
                indexer.proj stays F32 without `quantize_indexer_proj`; llama-quantize gives it the mix's type.
    catalog     the types of all 1,809 tensors of unsloth's GLM-5.2 UD-IQ2_XXS, read from its header by MahdiHedhli/PulsarMLX
                (docs/research/glm52/raw/f016-c01-catalog-0001.json at c32fedb).
    sizes       the sizes of unsloth's files of GLM-5.2 to the byte. The type of a group of tensors follows from the difference to another
                file's size where only one choice gives it.
    docs        unsloth's page of DeepSeek V3.1, which states the bits of down, and of gate and up, of the experts of each file.
    log         the number of tensors of each type that llama.cpp printed of a file, in threads of ikawrakow/ik_llama.cpp: of R1 in
                "Prepare wk_b tensors of DeepSeek models on the fly", of V3.1 in "tried to allocate 280 GB on cuda device 0".
    card        antirez's model card of deepseek-v4-gguf, a file of DeepSeek V4.

Layers are those of these models; in a model with fewer, the layers as far in the stack.
"""

import re
from typing import NamedTuple

import gguf

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
              "Q4_K_M": 15, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
              "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40}

# What llama.cpp stores where rows are not a multiple of the type's block of 256. Older versions took IQ4_NL for Q2_K and Q3_K.
FALLBACK = {**dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
            **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Mix(NamedTuple):
    """The types of a file: rules, the type of the rest, and their source.

    A rule is a place (a name in WHERE), a pattern of tensor names, and a type.
    """
    file_type: int      # general.file_type
    source: str
    rest: str
    rules: tuple


class Place(NamedTuple):
    """A tensor as the rules see it: its model, its layer, its shape."""
    spec: object
    name: str       # without "blk.N."
    layer: int      # -1 outside the layers
    shape: tuple

    @property
    def n(self):
        """Layers with the MTP block, as llama.cpp counts them."""
        return self.spec.n_layer + self.spec.nextn

    @property
    def nth_down(self):
        """How many ffn_down matrices come before this one in the file."""
        dense = min(self.layer, self.spec.n_layer_dense)
        return dense + (self.layer - dense) * (1 + (self.spec.n_expert_shared > 0)) + ("shexp" in self.name)

    def within(self, low, high):
        """Whether the layer is in this part of those with experts, 0 to 1."""
        n = self.spec.n_layer - self.spec.n_layer_dense
        return low * n <= self.layer - self.spec.n_layer_dense < high * n

    def like(self, *layers):
        """Whether the layer is as far in the stack as these of GLM-5.2.

        layers: of its 75 layers with experts, the first of which is 0.
        """
        n = self.spec.n_layer - self.spec.n_layer_dense
        return self.layer - self.spec.n_layer_dense in {min(round(i / 75 * n), n - 1) for i in layers} and n > 0


WHERE = {
    "all": lambda p: True,
    "first 1/8": lambda p: p.layer < p.n // 8,
    "first 1/16": lambda p: p.layer < p.n // 16,
    "middle 3/4": lambda p: p.n // 8 <= p.layer < 7 * p.n // 8,
    "ends, every 3rd": lambda p: p.layer < p.n // 8 or p.layer >= 7 * p.n // 8 or (p.layer - p.n // 8) % 3 == 2,
    "first 2": lambda p: p.layer < 2,
    "first 4": lambda p: p.layer < 4,
    "first 1/8 of matrices": lambda p: p.nth_down < p.n // 8,
    "8 experts": lambda p: p.spec.n_expert == 8,
    "8 experts, every 3rd": lambda p: p.spec.n_expert == 8 and WHERE["ends, every 3rd"](p),
    "4 experts or more": lambda p: p.spec.n_expert >= 4,
    "3-D": lambda p: len(p.shape) == 3 and p.shape[0] > 1,
    "ragged": lambda p: p.shape[-1] % 256 != 0,
    "MTP": lambda p: p.layer >= p.spec.n_layer,
    "layer 8": lambda p: p.like(5),
    "layers 75 to 77": lambda p: p.like(72, 73, 74),
    "first with experts": lambda p: p.layer == p.spec.n_layer_dense,
    "first 3 with experts": lambda p: 0 <= p.layer - p.spec.n_layer_dense < 3,
    "first 27 % with experts": lambda p: p.within(0, 0.27),
    "last 27 % with experts": lambda p: p.within(0.73, 1),
    "last 47 % with experts": lambda p: p.within(0.53, 1),
}

# llama-quantize has rules for Mixtral that apply to every model of eight experts.
EIGHT_LOW = (("8 experts", r"attn_k\.weight", "Q4_K"), ("8 experts", "attn_output", "Q5_K"))
EIGHT_KEYS = (("8 experts", r"attn_(k|kv_b)\.weight", "Q8_0"),)
EIGHT = (*EIGHT_KEYS, ("8 experts", "attn_output", "Q5_K"))


def stock(file_type, rest, *rules, output="Q6_K", eight=EIGHT):
    """A file type of llama-quantize.

    Its rules for grouped queries are left out: attn_kv_b is only in files without them.
    """
    ends = ("ragged", r"^output\.weight", "Q8_0"), ("all", r"^output\.weight", output)
    return Mix(file_type, "exact: llama.cpp", rest, (*ends, *eight, *rules))


def low_bits(file_type, rest, more, *rules):
    """A file type of llama-quantize of fewer than three bits.

    more: the type of the embedding and of the first ffn_down matrices.
    """
    return stock(file_type, rest, ("all", "^token_embd", more), ("4 experts or more", "attn_kv_b", "Q4_K"), ("all", "attn_kv_b", more),
                 ("first 1/8 of matrices", "ffn_down", more), *rules, output="Q5_K", eight=EIGHT_LOW)


MORE_BITS = ("ends, every 3rd", "attn_kv_b|ffn_down", "Q6_K")
STOCK = {
    "IQ1_S": low_bits(24, "IQ1_S", "Q2_K", ("all", "attn_output", "IQ2_XXS")),
    "IQ1_M": low_bits(31, "IQ1_M", "Q2_K", ("all", "attn_output", "IQ2_XXS")),
    "IQ2_XXS": low_bits(19, "IQ2_XXS", "Q2_K"),
    "IQ2_XS": low_bits(20, "IQ2_XS", "Q2_K"),
    "IQ2_S": low_bits(28, "IQ2_XS", "IQ3_S", ("all", "attn_output", "IQ3_S")),
    "IQ2_M": low_bits(29, "IQ2_S", "IQ3_S", ("all", "attn_output", "IQ3_S")),
    "Q2_K": stock(10, "Q2_K", ("all", "attn_kv_b|ffn_down|attn_output", "Q3_K")),
    "Q2_K_S": stock(21, "Q2_K", ("first 1/8", "ffn_down", "Q4_K"), eight=EIGHT_KEYS),
    "IQ3_XXS": stock(23, "IQ3_XXS", ("all", r"attn_[kq]\.weight", "IQ2_S"), ("all", "attn_output|^token_embd", "IQ3_S"), output="Q5_K"),
    "IQ3_XS": stock(22, "IQ3_S", ("all", r"attn_[kq]\.weight", "IQ3_XXS"), ("middle 3/4", "ffn_(gate|up)", "IQ3_XXS")),
    "IQ3_S": stock(26, "IQ3_S"),
    "IQ3_M": stock(27, "IQ3_S", ("all", "attn_kv_b|attn_output", "Q4_K"), ("first 1/8", "ffn_down", "Q4_K"),
                   ("8 experts, every 3rd", "ffn_down", "Q4_K")),
    "Q3_K_S": stock(11, "Q3_K"),
    "Q3_K_M": stock(12, "Q3_K", ("first 2", "attn_kv_b", "Q5_K"), ("first 1/16", "ffn_down", "Q5_K"),
                    ("all", "attn_kv_b|ffn_down|attn_output", "Q4_K")),
    "Q3_K_L": stock(13, "Q3_K", ("8 experts", "attn_output", "Q3_K"), ("all", "attn_kv_b|ffn_down|attn_output", "Q5_K"),
                    eight=EIGHT_KEYS),
    "IQ4_XS": stock(30, "IQ4_XS"),
    "Q4_K_S": stock(14, "Q4_K", ("first 4", "attn_kv_b", "Q5_K"), ("first 1/8", "ffn_down", "Q5_K")),
    "Q4_K_M": stock(15, "Q4_K", MORE_BITS),
    "Q5_K_S": stock(16, "Q5_K", eight=EIGHT_KEYS),
    "Q5_K_M": stock(17, "Q5_K", MORE_BITS, eight=EIGHT_KEYS),
    "MXFP4_MOE": Mix(38, "exact: llama.cpp", "Q8_0", (("3-D", "", "MXFP4"),)),      # 3-D: experts, but also attn_k_b and attn_v_b
}

GATE_UP, DOWN = "ffn_(gate|up)_exps", "ffn_down_exps"
# What all of unsloth's files of GLM-5.2 share, as far as it is known; layer 8 has more bits than the others in each.
GLM = (("layer 8", "attn_(q_a|output)|ffn_(gate|up)_shexp", "Q6_K"), ("layer 8", "ffn_down_shexp", "Q8_0"),
       ("all", "attn_(q_a|output)", "Q5_K"), ("all", "attn_|eh_proj", "Q8_0"),
       ("all", r"ffn_down(_shexp)?\.weight", "Q6_K"), ("all", r"ffn_(gate|up)(_shexp)?\.weight", "Q5_K"))
GLM_DOWN = (("MTP", GATE_UP, "Q2_K"), ("MTP", DOWN, "Q3_K"),
            ("layer 8", DOWN, "IQ4_XS"), ("layers 75 to 77", DOWN, "IQ4_XS"), ("all", DOWN, "IQ3_XXS"))
OUTPUT_Q5, OUTPUT_Q6 = ("all", r"^output\.weight", "Q5_K"), ("all", r"^output\.weight", "Q6_K")


def unsloth(file_type, source, *rules):
    """One of unsloth's files; the rest is the embedding, and the output."""
    return Mix(file_type, source, "Q4_K", (*GLM, *rules))


UNSLOTH = {
    "UD-IQ1_S": unsloth(        # 108 of 148 matrices are smaller by half a bit than in UD-IQ2_XXS, but which ones is not known
        24, "inferred: sizes (it agrees), docs", *GLM_DOWN,
        ("layer 8", GATE_UP, "IQ2_S"), ("last 27 % with experts", GATE_UP, "IQ2_XXS"), ("all", GATE_UP, "IQ1_S")),
    "UD-IQ1_M": unsloth(        # about half are smaller; IQ1_S may be among them
        31, "inferred: sizes (0.1 % off), docs", *GLM_DOWN,
        ("layer 8", GATE_UP, "IQ2_S"), ("last 47 % with experts", GATE_UP, "IQ2_XXS"), ("all", GATE_UP, "IQ1_M")),
    "UD-IQ2_XXS": unsloth(19, "exact: catalog", *GLM_DOWN, ("layer 8", GATE_UP, "IQ2_S"), ("all", GATE_UP, "IQ2_XXS")),
    "UD-IQ2_M": unsloth(        # it is UD-IQ2_XXS with one bit more in a matrix of the vocabulary, the output or the embedding
        29, "inferred: sizes (it agrees)", OUTPUT_Q5, *GLM_DOWN, ("layer 8", GATE_UP, "IQ2_S"), ("all", GATE_UP, "IQ2_XXS")),
    "UD-Q2_K_XL": unsloth(      # a program that reads it has a comment that names these types
        10, "inferred: sizes (it agrees)", OUTPUT_Q5, *GLM_DOWN, ("layer 8", GATE_UP, "IQ3_XXS"), ("all", GATE_UP, "IQ2_XS")),
    "UD-IQ3_XXS": unsloth(
        23, "inferred: sizes (1 % off)", OUTPUT_Q5, *GLM_DOWN[:-1], ("all", DOWN, "IQ3_S"),
        ("layer 8", GATE_UP, "IQ3_XXS"), ("all", GATE_UP, "IQ2_S")),
    "UD-Q3_K_XL": unsloth(12, "inferred: docs (6 % larger than sizes)", OUTPUT_Q6, ("all", DOWN, "Q4_K"), ("all", GATE_UP, "Q3_K")),
    "UD-Q4_K_XL": unsloth(      # the tests of two programs that read it have these types in the first layer with experts
        15, "inferred: docs (1 % smaller than sizes)", OUTPUT_Q6,
        ("first with experts", DOWN, "Q6_K"), ("first with experts", GATE_UP, "Q5_K"), ("all", DOWN, "Q5_K"), ("all", GATE_UP, "Q4_K")),
    "UD-Q2_K_XL-V3.1": Mix(     # the counts leave open which 16 of down have more bits, and which 41 of the others that are Q4_K here
        10, "inferred: log of V3.1", "Q4_K",
        (OUTPUT_Q6, ("all", GATE_UP, "Q2_K"), ("first 27 % with experts", DOWN, "Q4_K"), ("all", DOWN, "Q3_K"),
         ("all", "attn_(k_b|v_b|kv_b|kv_a_mqa)", "Q8_0"))),
    "UD-Q2_K_XL-R1": Mix(       # the counts agree; that the three Q3_K are the first of down is a guess
        10, "inferred: log of R1", "Q6_K",
        (("first 3 with experts", DOWN, "Q3_K"), ("all", "_exps", "Q2_K"), ("all", "attn_|token_embd", "Q4_K"))),
}
OTHERS = {
    "antirez-IQ2_XXS": Mix(     # the card's router is F16; here, as in other files of these architectures, F32
        19, "inferred: card", "Q8_0", (("all", GATE_UP, "IQ2_XXS"), ("all", DOWN, "Q2_K"), ("all", "^token_embd|indexer", "F16"))),
}
MIXES = {**STOCK, **UNSLOTH, **OTHERS}


def mixed_type(mix, spec, name, shape):
    """The type that a mix gives a matrix, wherever its rows would fit."""
    parts = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    if name == "token_embd.weight" and spec.tied_output:
        name = "output.weight"      # it serves as the output
    place = Place(spec, parts[2] if parts else name, int(parts[1]) if parts else -1, shape)
    return next((kind for where, pattern, kind in mix.rules if re.search(pattern, place.name) and WHERE[where](place)), mix.rest)


def tensor_type(spec, name, shape):
    """The GGML type of a tensor.

    Rows that do not fill a block get llama-quantize's fallbacks.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name or ("indexer.proj" in name and not spec.quantize_indexer_proj):
        return gguf.GGMLQuantizationType.F32
    mix = MIXES.get(spec.mix or (spec.type if spec.type == "Q4_K_M" else ""))
    kind = mixed_type(mix, spec, name, shape) if mix else spec.type
    if kind in FALLBACK and shape[-1] % 256:
        kind = FALLBACK[kind]
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return gguf.GGMLQuantizationType["F16" if shape[-1] % block else kind]


def file_type(spec):
    """The number of general.file_type."""
    return MIXES[spec.mix].file_type if spec.mix else FILE_TYPES[spec.type]
