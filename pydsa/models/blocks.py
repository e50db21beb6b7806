"""The blocks of a file: what its tensors and its metadata say of them.

An MTP block, for speculative decoding, is known by its nextn tensors. It comes after the layers of the model.
"""
import itertools
import re

from pydsa.errors import GGUFError, PydsaError, UnsupportedModelError
from pydsa.gguf.file import Metadata

BLOCK = re.compile(r"blk\.([0-9]{1,9})\.(.+)")
INDEXER = ("attn_q_b.weight", "attn_k.weight", "k_norm.weight", "k_norm.bias", "proj.weight")      # a layer's, as blk.N.indexer.*
GLM = ("glm4", "glm5", "chatglm-bpe")      # pre-tokenizers
TOP_K = 2048                                # of all published models with an indexer


def block_of(name):
    """The number of a tensor's block, -1 for a tensor of no block."""
    match = BLOCK.fullmatch(name)
    return int(match[1]) if match else -1


def settle_blocks(metadata, names):
    """Compare the metadata with the blocks that the file has.

    Returns Metadata in which block_count and nextn_predict_layers agree with the tensors' names, and notes, sentences for the user.
    Raises GGUFError or UnsupportedModelError where they leave open which blocks are layers of the model.
    """
    arch, notes = metadata.string("general.architecture"), []
    count = metadata.integer(f"{arch}.block_count", 1, 1024)
    declared = metadata.integer(f"{arch}.nextn_predict_layers", 0, 1024, default=0)
    matches = [match for match in map(BLOCK.fullmatch, names) if match]
    mtp = sorted({int(match[1]) for match in matches if match[2].startswith("nextn.")})
    layers = sorted({int(match[1]) for match in matches} - set(mtp))
    if not matches or declared >= count:        # the configuration or the graph says what is wrong
        return metadata, notes
    if not layers:
        raise UnsupportedModelError(f"{metadata.path}: the file has only the MTP block {mtp[0]}, for speculative decoding beside a "
                                    "model; open the file of the model itself.")
    end = layers[-1] + 1
    if mtp and mtp[0] < end:
        raise GGUFError(f"{metadata.path}: block {mtp[0]} has nextn tensors, and block {end - 1} after it has none, expected MTP blocks "
                        "after all layers.")
    if not mtp:
        _check_without_mtp(metadata, arch, count, declared, end)
        if declared and end == count - declared:
            notes.append(f"{declared} MTP block(s) are declared, but not in the file; pydsa runs models without them.")
        return metadata, notes
    if end not in (count - declared, count, count - len(mtp)):
        raise GGUFError(f"{metadata.path}: the file has layers 0 to {end - 1} and {len(mtp)} MTP block(s) from {mtp[0]} on, expected "
                        f"{count - declared} layers by {arch}.block_count, {count}, and nextn_predict_layers, {declared}.")
    if (end, end + len(mtp)) == (count - declared, count):
        return metadata, notes
    notes.append(f"{arch}.block_count is {count} and nextn_predict_layers is {declared}, but {len(mtp)} block(s) from {mtp[0]} "
                 f"on have the tensors of MTP blocks; the {end} blocks before are taken as the layers.")
    settled = Metadata(metadata, metadata.path, metadata.asked)
    settled.update({f"{arch}.block_count": end + len(mtp), f"{arch}.nextn_predict_layers": len(mtp)})
    return settled, notes


def _check_without_mtp(metadata, arch, count, declared, end):
    """Refuse files without nextn tensors whose last blocks could be either."""
    key = f"{arch}.nextn_predict_layers"
    if end > count:
        raise GGUFError(f"{metadata.path}: the file has blocks 0 to {end - 1}, but {arch}.block_count is {count}: blocks would be left "
                        f"out; if all are layers, use --override-kv {arch}.block_count=int:{end}.")
    if declared and end > count - declared:
        raise GGUFError(f"{metadata.path}: {key} is {declared}, but block {end - 1} has no nextn tensors, expected an MTP block; if it is "
                        f"a layer of the model, use --override-kv {key}=int:0.")


def indexer_advice(metadata, tensors):
    """How to run a deepseek2 file that has the tensors of an indexer.

    Returns a sentence; None if there is no such indexer, or the architecture has one.
    """
    layers = sorted({block_of(name) for name in tensors if ".indexer." in name})
    keys, proj = (tensors.get(f"blk.{layers[0]}.indexer.{part}.weight") if layers else None for part in ("attn_k", "proj"))
    if metadata.get("general.architecture") != "deepseek2" or keys is None or proj is None:
        return None
    arch = "glm-dsa" if metadata.get("tokenizer.ggml.pre") in GLM else "deepseek32"
    wanted = {"head_count": proj.shape[0], "key_length": keys.shape[0], "top_k": TOP_K}
    missing = [f"{arch}.attention.indexer.{key}=int:{value}" for key, value in wanted.items()
               if f"deepseek2.attention.indexer.{key}" not in metadata]
    return (f"{len(layers)} layers have an indexer of DeepSeek Sparse Attention, but the architecture deepseek2 has none: all attention is "
            f"dense, which the model was not trained for beyond {TOP_K} tokens; to run it sparse, use --override-kv "
            + ",".join([f"general.architecture=str:{arch}", *missing]))


def spans(names):
    """Where each name is: ["a", "a", "b", "a"] -> {"a": "0-1, 3", "b": "2"}."""
    result, first = {}, 0
    for name, run in itertools.groupby(names):
        last = first + len(list(run)) - 1
        result.setdefault(name, []).append(str(first) if first == last else f"{first}-{last}")
        first = last + 1
    return {name: ", ".join(parts) for name, parts in result.items()}


def begins_a_stage(config, layer):
    """Whether a stage may begin with a layer.

    A layer that shares the choice of an earlier one needs it: only hidden rows pass from stage to stage.
    """
    return config.indexed_layers is None or config.indexed_layers[layer] == layer


def check_stage(config, layers):
    """The range of the layers (first, stop) of a stage; None: all of the model.

    Raises PydsaError for layers that the model has not, and for a first one that shares the choice of keys of another.
    """
    if layers is None:
        return range(config.n_layer)
    first, stop = layers
    if not 0 <= first < stop <= config.n_layer:
        raise PydsaError(f"A stage has the layers {first} to {stop - 1}, expected some of 0 to {config.n_layer - 1}.")
    if not begins_a_stage(config, first):
        raise PydsaError(f"A stage begins with layer {first}, which takes the choice of keys of layer {config.indexed_layers[first]}: "
                         "let it begin with a layer that has an indexer.")
    return range(first, stop)
