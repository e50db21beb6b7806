"""The type of each tensor of a conversion: the mixes of `pydsa quantize`.

Norms, biases, the router and the indexer's weights of heads stay in F32, as they are small and what they decide is not; the indexer's
other matrices get no less than Q8_0. Rows that do not fill a type's blocks get another type.
"""
import re

from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.gguf.file import quote
from pydsa.gguf.layout import TensorInfo
from pydsa.quantization.choice import Choice, choose, wants_importance
from pydsa.quantization.mixes import ALIASES, MIXES

NAMES = ("F32", "BF16", "F16", "Q8_0", *(name for name in MIXES if name not in ("F32", "BF16", "F16", "Q8_0")))
ALWAYS_F32 = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|indexer\.proj\.weight")
QUANTIZATION_VERSION = 2


def check_type(name):
    """The name of a type or mix in the spelling of NAMES.

    Raises PydsaError for another.
    """
    found = name.upper() if isinstance(name, str) else None
    found = ALIASES.get(found, found)
    if found not in NAMES:
        raise PydsaError(f"The type is {quote(str(name))}, expected one of {', '.join(NAMES)}.")
    return found


def type_keys(name):
    """The keys of the metadata that say the type of a file."""
    return {"general.file_type": MIXES[name].file_type, "general.quantization_version": QUANTIZATION_VERSION}


def types_of(outputs, metadata, name):
    """TensorInfo of all outputs in a conversion to `name` of NAMES.

    metadata: gguf.file.Metadata of the model.
    """
    stored = {output.name: TensorInfo(output.name, "F32", output.shape) for output in outputs}
    chosen = choose(metadata, stored, name, Choice(), imatrix=False)
    return [info._replace(type="F32" if len(info.shape) == 1 or ALWAYS_F32.search(info.name) else chosen[info.name])
            for info in stored.values()]


def wanting_importance(infos, name):
    """The tensors of a conversion to `name` that need an imatrix."""
    return [info for info in infos if wants_importance(info.name, info.type, name)]


def check_importance(infos, name):
    """Refuse types that need an imatrix, which only quantize takes."""
    wanting = wanting_importance(infos, name)
    if wanting:
        raise UnsupportedModelError(f"{name} needs an importance matrix, for {quote(wanting[0].name)} and {len(wanting) - 1} more tensors: "
                                    "convert to BF16 or Q8_0 first, then use pydsa quantize with --imatrix.")
