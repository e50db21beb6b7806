"""Which types tensors get, by a mix and by what the user asks for."""
import re
from dataclasses import dataclass

import numpy as np

from pydsa.errors import PydsaError
from pydsa.gguf.file import GGML_TYPES, quote
from pydsa.quantization.mixes import ALIASES, MIXES, WANT_IMPORTANCE, Facts, fitting, may_be_quantized, places, rule_type
from pydsa.quants import TYPES

COPY = "COPY"       # in place of a type: all tensors as they are
INDEXER, SMALL = re.compile(r"\.indexer\..*weight$"), re.compile(r"\.indexer\.proj\.weight$")
BITS = {kind.name: 8 * kind.n_bytes / kind.block for kind in GGML_TYPES.values()}       # of a weight


@dataclass(frozen=True)
class Choice:
    """What a user asks for beside the type of the file.

    tensor_types: pairs of a pattern, which is searched in names, and a type; the first that fits counts. keep_indexer: whether the
    indexers' matrices stay Q8_0 or better. leave_output: whether output.weight stays as it is. output, embedding: types of output.weight
    and of token_embd.weight. pure: whether all matrices get the one type of the mix.
    """
    tensor_types: tuple = ()
    keep_indexer: bool = True
    leave_output: bool = False
    output: str | None = None
    embedding: str | None = None
    pure: bool = False


def file_type(text):
    """The name of a mix, or COPY; "q4_k" and "15" -> "Q4_K_M"."""
    name = text.upper() if isinstance(text, str) else None
    name = {str(mix.file_type): known for known, mix in MIXES.items()}.get(name, ALIASES.get(name, name))
    if name != COPY and name not in MIXES:
        raise PydsaError(f"The type is {quote(str(text))}, expected one of {', '.join(MIXES)} or {COPY}.")
    return name


def tensor_type(text, option):
    """The name of a tensor's type; option: what it is given with."""
    name = text.upper() if isinstance(text, str) else str(text)
    if name not in TYPES:
        raise PydsaError(f"{option} has the type {quote(str(text))}, expected one of {', '.join(TYPES)}.")
    return name


def checked_patterns(tensor_types):
    """Pairs (regular expression, type), or a dict, as Choice has them.

    Raises PydsaError for what is no pair, no pattern or no type.
    """
    pairs = list(tensor_types.items()) if isinstance(tensor_types, dict) else tensor_types
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise PydsaError(f"tensor_types is {quote(repr(tensor_types))}, expected a dict, or pairs of a regular expression and a type.")
    found = []
    for pattern, kind in pairs:
        try:
            found.append((re.compile(pattern), tensor_type(kind, "--tensor-type")))
        except (re.error, TypeError) as error:
            raise PydsaError(f"--tensor-type has the pattern {quote(str(pattern))}, which is no regular expression ({error}).") from None
    return tuple(found)


def facts(metadata, tensors, imatrix):
    """What the rules of mixes ask about an open file."""
    architecture = metadata.string("general.architecture", default="")
    heads = _of_first_layer(metadata, f"{architecture}.attention.head_count", 1)
    kv_heads = _of_first_layer(metadata, f"{architecture}.attention.head_count_kv", heads)
    return Facts(metadata.integer(f"{architecture}.block_count", default=0), metadata.integer(f"{architecture}.expert_count", default=0),
                 heads // kv_heads if kv_heads else 0, imatrix, "output.weight" not in tensors)


def _of_first_layer(metadata, key, default):
    """An integer, or the first one of an array of a number a layer."""
    if isinstance(metadata.get(key), np.ndarray):
        return int(metadata.integers(key)[:1].sum())
    return metadata.integer(key, default=default)


def choose(metadata, tensors, name, choice, imatrix):
    """{tensor name: type} of a file that is quantized to a mix, or COPY.

    metadata, tensors: those of an open file. imatrix: whether there is one. Raises PydsaError for a pattern that no name has.
    """
    if name == COPY:
        return {tensor.name: tensor.type for tensor in tensors.values()}
    found = places({tensor.name: tensor.shape for tensor in tensors.values()}, facts(metadata, tensors, imatrix))
    for pattern, _ in choice.tensor_types:
        if not any(pattern.search(tensor) for tensor in found):
            raise PydsaError(f"--tensor-type has the pattern {quote(pattern.pattern)}, which is in no name of a tensor.")
    return {tensor.name: _chosen(tensor, found[tensor.name], MIXES[name], choice) for tensor in tensors.values()}


def _chosen(tensor, place, mix, choice):
    """The type of one tensor."""
    if tensor.type not in TYPES or not may_be_quantized(tensor.name, tensor.shape):
        return tensor.type
    if tensor.name == "output.weight" and choice.leave_output:
        return tensor.type
    asked = next((kind for pattern, kind in choice.tensor_types if pattern.search(tensor.name)), None)
    if tensor.name == "token_embd.weight" and choice.embedding:
        asked = choice.embedding
    if tensor.name == "output.weight" and choice.output:
        asked = choice.output
    if asked is None and tensor.name == "token_embd.weight" and place.facts.tied and choice.output and not choice.pure:
        asked = choice.output
    kind = asked or (mix.rest if choice.pure or not TYPES[mix.rest].quantized else rule_type(mix, place))
    kind = fitting(kind, tensor.shape[-1])
    if asked is None and choice.keep_indexer and INDEXER.search(tensor.name):
        return _kept(tensor, kind)
    return kind


def _kept(tensor, kind):
    """The type of an indexer's matrix: never less than Q8_0 by this step.

    Its choice of keys is what sparse attention rests on, and it is small: what is stored as integers already stays as it is, and so does
    the matrix of its heads' weights, which is smaller still.
    """
    if BITS[kind] >= BITS["Q8_0"] and not SMALL.search(tensor.name):
        return kind
    if TYPES[tensor.type].quantized or SMALL.search(tensor.name):
        return tensor.type
    return fitting("Q8_0", tensor.shape[-1])


def wants_importance(name, kind, mix):
    """Whether a tensor of this type is of no use without importance."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return kind in WANT_IMPORTANCE or kind == "Q2_K" and mix == "Q2_K_S"
