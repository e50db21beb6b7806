"""The type of each tensor of a conversion.

Norms, biases, the router and the indexer's weights of heads stay in F32, as they are small and what they decide is not. Rows that do not
fill a type's blocks get F16.
"""
from pydsa.gguf_layout import TYPE_IDS
from pydsa.options import choose

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}       # general.file_type
ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "indexer.proj.weight")
QUANTIZATION_VERSION = 2
NAMES = tuple(FILE_TYPES)


def check_type(name):
    """The name of a type or mix in the spelling of NAMES.

    Raises PydsaError for another.
    """
    return choose("The type", name.upper() if isinstance(name, str) else name, NAMES)


def type_of(output, name):
    """The GGML type of an Output in a conversion to `name` of NAMES."""
    if len(output.shape) == 1 or output.name.endswith(ALWAYS_F32):
        return "F32"
    return name if output.shape[-1] % TYPE_IDS[name][1].block == 0 else "F16"
