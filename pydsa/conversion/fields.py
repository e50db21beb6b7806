"""JSON files of a folder: read with limits, and their values checked."""
import json
import math
import stat
from typing import Any

from pydsa.errors import CheckpointError
from pydsa.gguf.file import quote

REQUIRED: Any = object()        # default value that marks a field as required
MAX_JSON = 1 << 28              # bytes; the largest tokenizer.json has 33 MB, the largest index 13 MB


def read_text(path, what, most=MAX_JSON):
    """The text of a file, which has at most `most` bytes.

    Raises CheckpointError if it cannot be read, with `what` as its name.
    """
    return decode(read_bytes(path, what, most), path)


def read_bytes(path, what, most=MAX_JSON):
    """The bytes of a file, as read_text reads them."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: this is not a regular file, expected {what}.")
        if status.st_size > most:
            raise CheckpointError(f"{path}: the file has {status.st_size} bytes, expected {what} of at most {most}.")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file, expected {what}.") from None
    except (OSError, ValueError) as error:      # ValueError: a zero byte in the path
        raise CheckpointError(f"{path}: the file cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def decode(data, path):
    """Bytes -> text; raises CheckpointError if they are not UTF-8."""
    try:
        return data.decode().removeprefix("\ufeff")        # which programs of Windows put first
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not text, expected UTF-8.") from None


def parse(text, path, what):
    """JSON of an object -> dict.

    A key that is there twice is refused: programs differ in which they take. Raises CheckpointError.
    """
    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise CheckpointError(f"{path}: {what} has {quote(twice)} twice, expected it once.")
        return found

    try:
        values = json.loads(text, object_pairs_hook=unique)
        json.dumps(values, ensure_ascii=False).encode()     # a lone surrogate would be met when it is written
    except (ValueError, RecursionError) as error:
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else error
        raise CheckpointError(f"{path}: {what} is not JSON ({reason}).") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {what} is {kind_of(values)}, expected a JSON object.")
    return values


def read_json(path, what):
    """The object that a JSON file has, a dict."""
    return parse(read_text(path, what), path, what)


def kind_of(value):
    """A JSON value in a few words."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    return quote(json.dumps(value))


class Fields:
    """The fields of an object in a JSON file, checked when they are asked for.

    A field that is null counts as missing. Each accessor returns the default where a field is missing, and raises CheckpointError, which
    names the file and the field, where it is required, of another type or out of range.
    """

    def __init__(self, values, path, prefix=""):
        self.values, self.path, self._prefix = values, path, prefix

    def __contains__(self, name):
        return self.values.get(name) is not None

    def fail(self, name, expected):
        """Raise CheckpointError for a field."""
        found = kind_of(self.values[name]) if name in self.values else "missing"
        raise CheckpointError(f"{self.path}: {self._prefix}{name} is {found}, expected {expected}.")

    def integer(self, name, low=0, high=2**31 - 1, default=REQUIRED):
        """The integer of a field, low <= value <= high."""
        return self._get(name, default, f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high)

    def number(self, name, low=-math.inf, high=math.inf, default=REQUIRED):
        """The finite number of a field as a float, low <= value <= high."""
        bounds = "" if low == -math.inf else f" from {low:g} to {high:g}"
        return self._get(name, default, f"a number{bounds}",
                         lambda v: type(v) in (int, float) and abs(v) < 1e300 and low <= v <= high, float)

    def boolean(self, name, default=REQUIRED):
        """The bool of a field."""
        return self._get(name, default, "true or false", lambda v: type(v) is bool)

    def string(self, name, default=REQUIRED, among=None):
        """The string of a field, one of `among` if they are given."""
        expected = "a string" if among is None else "one of " + ", ".join(among)
        return self._get(name, default, expected, lambda v: type(v) is str and (among is None or v in among))

    def strings(self, name, default=REQUIRED):
        """The list of strings of a field."""
        return self._get(name, default, "an array of strings", lambda v: type(v) is list and all(type(item) is str for item in v))

    def integers(self, name, default=REQUIRED):
        """The list of integers from 0 on of a field."""
        return self._get(name, default, "an array of integers from 0 on",
                         lambda v: type(v) is list and all(type(item) is int and 0 <= item < 2**63 for item in v))

    def fields(self, name, default=REQUIRED):
        """The Fields of an object in a field."""
        values = self._get(name, default, "an object", lambda v: type(v) is dict)
        return Fields(values, self.path, f"{self._prefix}{name}.") if type(values) is dict else values

    def _get(self, name, default, expected, accept, convert=lambda value: value):
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if value is None or not accept(value):
            self.fail(name, expected)
        return convert(value)
