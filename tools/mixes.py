"""The types of a file's tensors: one for all matrices, or a mix.

A mix is a list of rules, and the first that fits a tensor gives its type. A mix is called exact where its rules are those of the program
that writes such files, or were read from a published file, and inferred where they only agree with what is known of one.

Where the rules come from:

    llama.cpp   pydsa.quantization.mixes, with an importance matrix. indexer.proj stays F32 without `quantize_indexer_proj`; llama-quantize
                gives it the mix's type.
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

from pydsa.quantization import mixes
from pydsa.quantization.mixes import Facts, fitting, rule_type

# A type for all matrices has the number of the mix with most of it.
FILE_TYPES = {name: mix.file_type for name, mix in mixes.MIXES.items() if name == mix.rest or name == "Q4_K_M"} | {
    "IQ2_S": 28, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "MXFP4": 38, "NVFP4": 39}


class Mix(NamedTuple):
    """The types of a file: rules, the type of the rest, and their source.

    A rule is a place (a name in WHERE), a pattern of tensor names, and a type.
    """
    file_type: int      # general.file_type
    source: str
    rest: str
    rules: tuple


class Place(NamedTuple):
    """A tensor as the rules see it, with the model's sizes."""
    facts: Facts
    name: str       # without "blk.N."
    layer: int      # -1 outside the layers
    shape: tuple
    spec: object

    @property
    def nth_v(self):
        """How many matrices of values come before: one a layer."""
        return self.layer

    @property
    def n_v(self):
        """The number of matrices of values: one a layer."""
        return self.facts.n_layer

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
    **mixes.WHERE,
    "MTP": lambda p: p.layer >= p.spec.n_layer,
    "layer 8": lambda p: p.like(5),
    "layers 75 to 77": lambda p: p.like(72, 73, 74),
    "first with experts": lambda p: p.layer == p.spec.n_layer_dense,
    "first 3 with experts": lambda p: 0 <= p.layer - p.spec.n_layer_dense < 3,
    "first 27 % with experts": lambda p: p.within(0, 0.27),
    "last 27 % with experts": lambda p: p.within(0.73, 1),
    "last 47 % with experts": lambda p: p.within(0.53, 1),
}

STOCK = {name: Mix(mix.file_type, "exact: llama.cpp", mix.rest, mix.rules) for name, mix in mixes.MIXES.items() if mix.rules}

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
    heads = 1 if spec.legacy_kv_b else spec.n_head
    facts = Facts(spec.n_layer + spec.nextn, spec.n_expert, heads, True, spec.tied_output)
    return rule_type(mix, Place(facts, parts[2] if parts else name, int(parts[1]) if parts else -1, shape, spec), WHERE)


def tensor_type(spec, name, shape):
    """The GGML type of a tensor.

    Rows that do not fill a block get llama-quantize's fallbacks.
    """
    if len(shape) == 1 or "ffn_gate_inp" in name or ("indexer.proj" in name and not spec.quantize_indexer_proj):
        return gguf.GGMLQuantizationType.F32
    mix = MIXES.get(spec.mix or (spec.type if spec.type == "Q4_K_M" else ""))
    return gguf.GGMLQuantizationType[fitting(mixed_type(mix, spec, name, shape) if mix else spec.type, shape[-1])]


def file_type(spec):
    """The number of general.file_type."""
    return MIXES[spec.mix].file_type if spec.mix else FILE_TYPES[spec.type]
