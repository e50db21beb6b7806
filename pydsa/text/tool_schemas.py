"""Schemas of tools, as far as a grammar can hold a call to them.

    schema, reason = held(parameters, problem)

A client offers all tools that it has, most of them for other calls than the next one. One schema that no grammar can hold must not end the
conversation: of such a schema only the parts are kept that can be held, so that all arguments that it allows stay possible.
"""
import json
import re

from pydsa.text.grammars import ConstraintError

# What grammars know of a schema, beside the keys of _NAMED. Without any other key, more is valid.
_KNOWN = ("type", "enum", "const", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "pattern",
          "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "$ref")
_NAMED = ("properties", "$defs", "definitions")
_ROUGH = ("pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "required")
_PARTS = ("allOf", "anyOf", "oneOf")
PLAIN_NAME = re.compile(r"""[^<>"\s](?:[^<>"\n]*[^<>"\s])?""")     # that arguments may have in every form of calls
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")


def held(parameters, problem):
    """(a schema that a call can be held to, why it is not all of it or None).

    parameters: the schema of a function's arguments. problem(schema): why a schema cannot be held, or None. Raises ConstraintError if not
    even the names of arguments can be.
    """
    reason = problem(parameters)
    if reason is None:
        return parameters, None
    declared, required = _arguments(parameters)
    plain = {name: part for name, part in declared.items() if PLAIN_NAME.fullmatch(name)}
    for arguments in (declared, plain, {}):
        for way in (lambda part: part, lambda part: _known(part, True), lambda part: _known(part, False), _type, lambda part: True):
            schema = {"type": "object", "properties": {name: way(part) for name, part in arguments.items()},
                      "required": [name for name in required if name in arguments]}
            schema |= {key: {name: way(part) for name, part in parameters[key].items()} for key in ("$defs", "definitions")
                       if isinstance(parameters, dict) and isinstance(parameters.get(key), dict)}
            if problem(schema) is None:
                return schema, reason
    raise ConstraintError(reason)


def _arguments(schema):
    """({name: schema}, names of those that are required) of all parts."""
    declared, required, left, seen = {}, [], [(schema, True)], set()
    while left:
        part, holds = left.pop(0)
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        own = part.get("properties") if isinstance(part.get("properties"), dict) else {}
        for name, one in own.items():
            declared[name] = one if declared.get(name, one) == one else True
        if holds and isinstance(part.get("required"), list):
            required += [name for name in part["required"] if isinstance(name, str)]
        for key in _PARTS:
            left += [(one, holds and key == "allOf") for one in part[key]] if isinstance(part.get(key), list) else []
        left += [(part.get(key), False) for key in ("then", "else")] + [(_target(part.get("$ref"), schema), holds)]
    return declared | {name: True for name in required if name not in declared}, dict.fromkeys(required)


def _target(ref, root):
    """What a $ref into the definitions stands for, or None."""
    found = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", ref) if isinstance(ref, str) else None
    listed = root.get(found[1]) if found else None
    return listed.get(found[2]) if isinstance(listed, dict) else None


def _known(schema, fine):
    """A schema without what grammars do not know.

    fine: whether patterns and limits stay.
    """
    if not isinstance(schema, dict) or not _leads(schema.get("$ref", "#/$defs/")):
        return True
    result = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            result[key] = {name: _known(part, fine) for name, part in value.items()}
        elif key in ("anyOf", "oneOf") and isinstance(value, list):
            result["anyOf"] = [_known(part, fine) for part in value]
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            result[key] = _known(value, fine)
        elif key == "allOf" and isinstance(value, list) and len(value) == 1:
            result |= {name: part for name, part in only.items() if name not in schema} if isinstance(
                only := _known(value[0], fine), dict) else {}
        elif key in _KNOWN and key not in _PARTS and (fine or key not in _ROUGH):
            result[key] = value
    if "patternProperties" in schema:       # what they allow may have no other place
        result.pop("additionalProperties", None)
    return result


def _leads(ref):
    return isinstance(ref, str) and ref.startswith(("#/$defs/", "#/definitions/"))


def _type(schema):
    """Only the types of a schema; True if it says none."""
    given = schema.get("type") if isinstance(schema, dict) else None
    listed = given if isinstance(given, list) and given else [given]
    return {"type": given} if all(isinstance(one, str) and one in _TYPES for one in listed) else True


def key_of(parameters):
    """The text of a schema, by which what was found of it is kept."""
    try:
        return json.dumps(parameters, allow_nan=False)
    except RecursionError:
        raise ConstraintError("the schema of a tool is nested too deeply, expected a few levels") from None
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"the schema of a tool is not JSON ({error})") from None
