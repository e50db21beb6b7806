"""Values that replace those of a file's metadata, or add to them.

On the command line: `--override-kv KEY=TYPE:VALUE`, as in llama.cpp.
"""
import math
import re

import numpy as np

from pydsa.errors import PydsaError
from pydsa.gguf.file import MAX_KEY, Metadata, quote

TYPES = "int, float, bool and str"
ARCHITECTURE = "general.architecture"
READ_WITH_THE_FILE = re.compile(r"split\..*|general\.alignment")     # they say where its parts and weights are
OF_THE_TOKENIZER = re.compile(
    r"tokenizer\.(chat_template|ggml\.(model|pre|add_(bos|eos)_token|(bos|eos|eot|eom|fim_(pad|rep|sep))_token_id))")


def parse_overrides(texts):
    """Texts "KEY=TYPE:VALUE", or several of them with commas between -> dict.

    Raises PydsaError for a text of another form, or a value that is not of its type.
    """
    overrides = {}
    for text in texts:
        for part in re.split(r",(?=[^,=]+=(?:int|float|bool|str):)", text):     # a str may have commas
            match = re.fullmatch(r"([^=]+)=([a-z]+):(.*)", part, re.DOTALL)
            if not match:
                raise PydsaError(f"--override-kv is {quote(part)}, expected KEY=TYPE:VALUE, with one of the types {TYPES}.")
            key, kind, value = match.groups()
            if key in overrides:
                raise PydsaError(f"--override-kv has the key {quote(key)} twice, expected it once.")
            overrides[key] = _parse(key, kind, value)
    return overrides


def _parse(key, kind, text):
    """The text of a value as the int, float, bool or str that it stands for."""
    if kind == "str":
        return text
    if kind == "bool":
        if text in ("true", "false"):
            return text == "true"
        raise PydsaError(f"--override-kv {key}=bool has the value {quote(text)}, expected true or false.")
    if kind not in ("int", "float"):
        raise PydsaError(f"--override-kv {key} has the type {quote(kind)}, expected one of {TYPES}.")
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        raise PydsaError(f"--override-kv {key}={kind} has the value {quote(text)}, expected a number.") from None


def override(metadata, overrides):
    """A copy of a file's Metadata with other values, {key: int, float, bool or str}.

    With another general.architecture, the keys of the file's architecture become keys of that one.
    Raises PydsaError for a key that cannot be replaced, or a value of another type than the file's.
    """
    if not isinstance(overrides, dict):
        raise PydsaError(f"override_kv is of type {type(overrides).__name__}, expected a dict of keys and values.")
    if not overrides:
        return metadata
    result = Metadata(metadata, metadata.path)
    old, new = metadata.get(ARCHITECTURE), overrides.get(ARCHITECTURE, metadata.get(ARCHITECTURE))
    if isinstance(new, str) and new != old:
        for key in [key for key in result if key.startswith(f"{old}.")]:
            result.setdefault(new + key.removeprefix(str(old)), result.pop(key))
    for key, value in overrides.items():
        _check(result, key, value)
        if new != old and key.startswith(f"{old}."):
            raise PydsaError(f"The override of {quote(key)} would change nothing, as the architecture is overridden too; use "
                             f"{quote(new + key.removeprefix(str(old)))}.")
    result.update(overrides)
    return result


def _check(metadata, key, value):
    """Refuse a value that cannot replace what the file has."""
    if not isinstance(key, str) or not 0 < len(key.encode(errors="replace")) <= MAX_KEY:
        raise PydsaError(f"override_kv has the key {quote(str(key))}, expected a text of 1 to {MAX_KEY} bytes.")
    if READ_WITH_THE_FILE.fullmatch(key):
        raise PydsaError(f"{quote(key)} cannot be overridden: it says where the weights are, and is read with the file.")
    if type(value) not in (int, float, bool, str):
        raise PydsaError(f"The override of {quote(key)} is of type {type(value).__name__}, expected one of {TYPES}.")
    if type(value) is float and not math.isfinite(value) or type(value) is int and not -2**63 <= value < 2**64:
        raise PydsaError(f"The override of {quote(key)} is {value}, expected a finite number of 64 bits.")
    found = metadata.get(key)
    if isinstance(found, list):
        raise PydsaError(f"{metadata.path}: {quote(key)} is an array of strings, which cannot be overridden.")
    if isinstance(found, np.ndarray):       # one number for all layers
        found = found.dtype.type(0).item()
    if found is not None and type(value) is not type(found):
        raise PydsaError(f"{metadata.path}: the override of {quote(key)} is of type {type(value).__name__}, "
                         f"expected {type(found).__name__}, as in the file.")


def check_all_read(metadata, overrides, stored):
    """Refuse overrides that change nothing: keys that are neither read nor in the file.

    metadata: with the overrides, after the model's configuration was read from it. stored: the file's own.
    """
    for key in overrides:
        if key not in metadata.asked and key not in stored and not OF_THE_TOKENIZER.fullmatch(key):
            raise PydsaError(f"{metadata.path}: nothing reads the key {quote(key)} of the override; look for a slip in its name.")
