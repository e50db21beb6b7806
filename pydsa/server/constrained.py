"""Fields that restrict what the model may write."""
from typing import Any

from pydsa.server.bodies import Fields, expected, shown
from pydsa.server.errors import ApiError

CHOICES = ("auto", "none", "required")


class Constrained(Fields):
    """The fields of OpenAI's API, and those that llama.cpp's server adds."""
    response_format: dict[str, Any] | None = expected("an object with a type")
    json_schema: dict[str, Any] | bool | None = expected("a JSON schema")
    grammar: str | None = expected("a grammar in GBNF")

    def wanted(self):
        """What the answer shall be -> (kind, value), or None where all may come.

        kind: "json_object", "json_schema" or "grammar". Raises ApiError.
        """
        given = [name for name in ("response_format", "json_schema", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)} are given, expected one of them.", given[1], "invalid_value")
        if not given:
            return None
        if given[0] != "response_format":
            return given[0], getattr(self, given[0])
        kind = self.response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":      # llama.cpp's server takes a schema with it
            schema = self.response_format.get("schema")
            return ("json_object", None) if schema is None else ("json_schema", schema)
        if kind == "json_schema":
            named = self.response_format.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if isinstance(schema, (dict, bool)):
                return "json_schema", schema
            raise ApiError(400, 'response_format has no schema, expected {"type": "json_schema", "json_schema": {"schema": ...}}.',
                           "response_format", "invalid_value")
        raise ApiError(400, f"response_format has the type {shown(kind)}, expected text, json_object or json_schema.", "response_format",
                       "invalid_value")


def tool_choice(given, tools):
    """What tool_choice asks for.

    "auto", "none", "required", or the name of a function, in a tuple. Raises ApiError for what it is not, and for a function that is not
    among the tools.
    """
    if given is None:
        return "auto"
    if given in CHOICES:
        if given == "required" and not tools:
            raise ApiError(400, "tool_choice is 'required', but there are no tools.", "tool_choice", "invalid_value")
        return given
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    names = [tool["function"].get("name") for tool in tools or () if isinstance(tool.get("function"), dict)]
    if not isinstance(name, str) or name not in names:
        raise ApiError(400, f"tool_choice is {shown(given)}, expected auto, none, required, or the name of one of the tools as "
                            '{"type": "function", "function": {"name": ...}}.', "tool_choice", "invalid_value")
    return (name,)


def constraint_of(wanted, choice):
    """The constraint of a request, or None; raises ApiError.

    wanted: of Constrained.wanted(). choice: of tool_choice().
    """
    if wanted is not None:
        raise ApiError(400, f"The answer cannot be held to a {wanted[0]} by this server.", "response_format", "unsupported_value")
    if choice not in ("auto", "none"):
        raise ApiError(400, "tool_choice cannot demand a call from this server, expected auto or none.", "tool_choice", "unsupported_value")
    return None
