"""Read the bodies of requests: JSON, checked before anything else sees it.

    fields = await read_fields(request, ChatRequest)
"""
import asyncio
import functools
import json
import math
import re
from typing import Annotated, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from pydsa.server.errors import ApiError
from pydsa.server.settings import MAX_BODIES, MAX_BODY, MAX_DEPTH, MAX_VALUES

SMALL = 1 << 16         # bytes that are parsed at once; more would keep other clients waiting
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


Item = TypeVar("Item")
Listed = Annotated[list[Item], FailFast()]      # only the first wrong item is told, and only that takes memory


class Fields(BaseModel):
    """The fields of a body; unknown ones are ignored, as null ones are.

    The description of a field ends the sentence on a wrong one: "expected ...".
    """
    model_config = ConfigDict(strict=True, extra="ignore")


def expected(words, **constraints):
    """A field that may be left out; words: what it should be."""
    return Field(default=None, description=words, **constraints)


async def read_bytes(request, most=MAX_BODY):
    """The body of a request; raises ApiError if it has more than `most` bytes."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "The body is compressed, expected plain JSON.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most)
    parts, n, service = [], 0, request.scope["pydsa.service"]
    try:
        async for part in request.stream():
            n += len(part)
            service.body_bytes += len(part)
            if n > most:
                raise _too_large(most)
            if n > SMALL and service.body_bytes > MAX_BODIES:
                raise ApiError(503, "Other requests that are coming in take all the room for large bodies; try again soon.")
            parts.append(part)
        return b"".join(parts)
    finally:
        service.body_bytes -= n


async def read_json(request):
    """The body of a request as what its JSON stands for.

    Raises ApiError for anything but JSON in UTF-8 without NaN, infinities, keys that occur twice, or hundreds of levels.
    """
    data = await read_bytes(request)
    return parse_json(data) if len(data) <= SMALL else await asyncio.to_thread(parse_json, data)


async def read_fields(request, kind):
    """The body of a request as a model of pydantic; raises ApiError."""
    value = await read_json(request)
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is a JSON {_kind(value)}, expected an object.")
    return check_fields(value, kind)


def check_fields(value, kind):
    """The fields of a dict as a model of pydantic; raises ApiError."""
    integers = _integers(kind)
    try:
        return kind.model_validate({name: _whole(item) if name in integers else item for name, item in value.items() if item is not None})
    except ValidationError as error:
        raise _wrong_field(error.errors(include_url=False)[0], value, kind) from None


@functools.cache
def _integers(kind):
    """The names of fields that are integers."""
    return {name for name, field in kind.model_fields.items() if int in get_args(field.annotation) or field.annotation is int}


def _whole(value):
    """A number without a fraction as an int: some languages have only floats, and write 5.0."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def parse_json(data):
    """What the JSON in some bytes stands for; raises ApiError (see read_json)."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8 text (byte {error.start}).") from None
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise ApiError(413, f"The body may have more than {MAX_VALUES} values, expected at most so many commas and brackets.")
    try:
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:      # Python reads no integers of thousands of digits
        raise ApiError(400, "The body has an integer of thousands of digits, expected numbers of a common size.") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "The body has half of a surrogate pair (\\ud800 to \\udfff), expected Unicode text.") from None
    return value


def _too_large(most):
    return ApiError(413, f"The body has more than {most >> 20} MiB, expected at most so many.")


def _too_deep():
    return ApiError(400, f"The body is nested more than {MAX_DEPTH} levels deep, expected a few.")


def _check_depth(value):
    """Raise ApiError for values nested too deeply for functions that recurse."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for outer in level if isinstance(outer, (dict, list))
                 for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise _too_deep()


def _object(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ApiError(400, f"The body has the key {twice!r:.80} twice in one object, expected it once.")
    return result


def _number(text):
    number = float(text)
    if not math.isfinite(number):
        raise ApiError(400, f"The body has the number {text:.40}, expected numbers up to 1.8e308.")
    return number


def _constant(text):
    raise ApiError(400, f"The body has {text}, expected JSON, which has no such number.")


def _kind(value):
    names = {bool: "boolean", type(None): "null", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")


def unreadable(kind):
    """The text in the place of an image, or of another thing that is no text."""
    return f"[{kind}: this model reads text only]"


def shown(value):
    """A value as an error shows it: short, whatever it is."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f"an {_kind(value)} of {len(value)}"
    return f"{json.dumps(value if not isinstance(value, str) else value[:80], ensure_ascii=False, default=str):.80}"


def _wrong_field(error, value, kind):
    """The ApiError on the first field that is not as expected."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return ApiError(400, f"The field {name!r:.80} is missing.", name, "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"The field {name!r:.80} is not one of this API.", name, "unknown_parameter")
    place = value[name] if name in value else error["input"]
    field = kind.model_fields.get(name)
    words = field.description if field is not None and field.description else error["msg"]
    return ApiError(400, f"{name} is {shown(place)}, expected {words}.", name, "invalid_type")
