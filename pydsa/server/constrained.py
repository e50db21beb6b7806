"""Fields that restrict what the model may write."""
import asyncio
from typing import Any, NamedTuple

from pydsa.server.bodies import Fields, expected, shown
from pydsa.server.errors import ApiError, as_api_error
from pydsa.text.answers import Layout
from pydsa.text.constraint import compile_constraint
from pydsa.text.grammars import ConstraintError, grammar, json_object, json_schema
from pydsa.text.tool_grammars import tools


class Wanted(NamedTuple):
    """What an answer shall be.

    kind: "json_object", "json_schema" or "grammar". field: of the request, that asks for it.
    """
    kind: str
    value: Any
    field: str


class Constrained(Fields):
    """The fields of OpenAI's API, and those that llama.cpp's server adds."""
    response_format: dict[str, Any] | None = expected("an object with a type")
    json_schema: dict[str, Any] | bool | None = expected("a JSON schema")
    grammar: str | None = expected("a grammar in GBNF")

    def wanted(self):
        """What the answer shall be, a Wanted; None: all may come.

        Raises ApiError.
        """
        given = [name for name in ("response_format", "json_schema", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)} are given, expected one of them.", given[1], "invalid_value")
        if not given:
            return None
        if given[0] != "response_format":
            return Wanted(given[0], getattr(self, given[0]), given[0])
        kind = self.response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":      # llama.cpp's server takes a schema with it
            schema = self.response_format.get("schema")
            return Wanted("json_object" if schema is None else "json_schema", schema, "response_format")
        if kind == "json_schema":
            named = self.response_format.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if isinstance(schema, (dict, bool)):
                return Wanted("json_schema", schema, "response_format")
            raise ApiError(400, 'response_format has no schema, expected {"type": "json_schema", "json_schema": {"schema": ...}}.',
                           "response_format", "invalid_value")
        raise ApiError(400, f"response_format has the type {shown(kind)}, expected text, json_object or json_schema.", "response_format",
                       "invalid_value")


async def constraint_of(service, wanted, layout=None, choice=None, parallel=True, thinking=False):
    """The constraint of a request, or None where anything may come.

    wanted: a Wanted, or None. layout: the answers.Layout, with the tools. choice, parallel: which of them must be called, in OpenAI's
    form, and whether several may be. thinking: whether the model may reason first. Raises ApiError for what is not served.
    """
    return await asyncio.to_thread(_compile, service.model.tokenizer, wanted, layout or Layout(), choice or "auto", parallel, thinking)


def _compile(tokenizer, wanted, layout, choice, parallel, thinking):
    """Compile the constraint, which takes up to seconds.

    With tools beside what is wanted, the answer is either.
    """
    param, said = None, None
    try:
        if wanted is not None:
            param = wanted.field
            said = (json_object() if wanted.kind == "json_object" else json_schema(wanted.value) if wanted.kind == "json_schema" else
                    grammar(wanted.value))
        if said is not None and layout.form is not None:
            said = said._replace(form=layout.form)
        if said is None or layout.tools:
            param = "tools"
        rule = tools(layout, choice, parallel, said)
        return None if rule is None else compile_constraint(tokenizer, rule, layout, thinking)
    except ConstraintError as error:
        raise ApiError(400, as_api_error(error).message, "tool_choice" if error.of_choice else param, "invalid_value") from None
