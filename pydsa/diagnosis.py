"""Where a result that is not finite comes from: the layer and, if it can be found, the damaged tensor."""
import contextlib

import numpy as np

from pydsa.errors import DamagedWeightsError, GGUFError
from pydsa.executor.hooks import Observer
from pydsa.gguf.check import faults
from pydsa.gguf.file import Tensor

MASKS = ("indexer_scores", "scatter_mask")      # ops that write -inf for keys that a token does not see
LOOKED_AT = 1 << 30         # bytes of the largest tensor that is read on suspicion, because it is in the layer
HIDDEN = (".indexer.", ".ffn_gate_inp.", ".exp_probs_b.")       # in the names of weights whose results are only compared


def explained(error, bound, ids, n_past, weights):
    """A DamagedWeightsError like `error` that says where it comes from.

    The step is run again, to see the first value that is not finite. bound: the Bound of the step of ids after n_past tokens. weights: the
    model's tensors by name.
    """
    node = _first_node(bound, ids, n_past)
    if node is None:        # every value is finite but what a choice adds to scores: a vector
        layer, suspects = "", [tensor for tensor in weights.values() if len(tensor.shape) == 1]
    else:
        layer = node.name.rpartition("-")[2]
        suspects = [a for a in node.args if isinstance(a, Tensor)]
        suspects += [tensor for name, tensor in weights.items() if name.startswith(f"blk.{layer}.") and tensor.data.nbytes <= LOOKED_AT]
    for tensor in suspects:
        found = faults(tensor)
        if found.nan or found.infinite:
            return DamagedWeightsError(f"{error}; tensor {tensor.made_of or tensor.name!r} has {found.in_words()}: get the file again.")
    if node is None:
        return error
    place = f"layer {layer}" if layer.isdigit() else "the model"
    return DamagedWeightsError(f"{error}; {node.name!r} in {place} has the first value that is not finite (`pydsa info --check` reads all "
                               "of the file).")


def _first_node(bound, ids, n_past):
    """The first node of a step that writes a value that is not finite."""
    met = []

    def observe(node, arrays):
        if not met and any(_is_damaged(node, array) for array in arrays):
            met.append(node)
    logits = None if bound.output is None else np.empty(bound.output.shape, np.float32)
    with contextlib.suppress(DamagedWeightsError):
        bound.run(ids, n_past, logits, (Observer(observe),))
    return met[0] if met else None


def _is_damaged(node, array):
    if array.dtype.kind != "f":
        return False
    return bool(np.isnan(array).any() if node.op in MASKS else not np.isfinite(array).all())


def refuse_hidden(tensor, path):
    """Raise GGUFError for a damaged tensor whose NaN a choice would hide.

    For devices that copy the weights, and do not mark what their choices of keys and experts meet. The vocabulary is one: the row of a
    token in the middle of a prompt is only seen by a choice of keys.
    """
    if any(part in tensor.name for part in HIDDEN) or tensor.name == "token_embd.weight":
        found = faults(tensor)
        if found.nan or found.infinite:
            raise GGUFError(f"{path}: tensor {tensor.name!r} has {found.in_words()}: the weights are damaged, get the file again")
