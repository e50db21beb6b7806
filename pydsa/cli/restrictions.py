"""The options of `pydsa run` that say what an answer may be.

A JSON schema, a grammar, tools: their texts and files are read and checked before the model is.
"""
import json
from pathlib import Path
from typing import Any, NamedTuple

import click

from pydsa.cli.types import FileName


MAX_FILE = 1 << 20      # bytes


class Restrictions(NamedTuple):
    """What an answer may be; nothing of it: anything."""
    json_schema: Any = None
    grammar: str | None = None
    tools: list | None = None

    def constraint(self, tokenizer, layout, thinking):
        """The constraint.Constraint of an answer, or None."""
        from pydsa.text.constraint import constraint_for
        return constraint_for(tokenizer, layout, thinking, json_schema=self.json_schema, grammar=self.grammar, tool_choice="auto")


def restriction_options(function):
    """A decorator: a command with the options that read_restrictions takes."""
    for option in reversed((
            click.option("-j", "--json-schema", "json_schema", metavar="SCHEMA",
                         help="Answer in JSON by a schema: the schema's text, which begins with {, or a file with it."),
            click.option("-jf", "--json-schema-file", type=FileName(), metavar="FILE", help="Answer in JSON by the schema in a file."),
            click.option("--grammar", metavar="TEXT", help="Answer by a grammar in GBNF."),
            click.option("--grammar-file", type=FileName(), metavar="FILE", help="Answer by the grammar in a file."),
            click.option("--tools", type=FileName(), metavar="FILE",
                         help="Offer the functions in a file, a JSON list as in OpenAI's API. A call goes to stdout as a line of JSON; "
                              "in a chat its result can be typed."))):
        function = option(function)
    return function


def read_restrictions(raw, json_schema=None, json_schema_file=None, grammar=None, grammar_file=None, tools=None):
    """The Restrictions of the options' values.

    raw: whether the prompt is continued as it is. Raises UsageError for files and texts that are not what they should be, and PydsaError
    for schemas and grammars that cannot be served, or if the library that constrains is missing.
    """
    values = {"-j": json_schema, "-jf": json_schema_file, "--grammar": grammar, "--grammar-file": grammar_file}
    given = [name for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{given[0]} and {given[1]} both say what the answer is: give one of them.")
    if raw and tools is not None:
        raise click.UsageError("--tools belongs to the chat format, which --raw leaves out.")
    if json_schema is not None and not json_schema.lstrip().startswith(("{", "true", "false")):
        json_schema, json_schema_file = None, json_schema
    schema = None
    if json_schema is not None or json_schema_file is not None:
        schema = _json(_read("-jf", json_schema_file) if json_schema is None else json_schema, json_schema_file or "-j", "a JSON schema")
    if grammar_file is not None:
        grammar = _read("--grammar-file", grammar_file)
    listed = None if tools is None else _json(_read("--tools", tools), tools, "a JSON list of tools")
    result = Restrictions(schema, grammar, listed)
    if result != Restrictions():
        _check(result)
    return result


def _check(restrictions):
    """Raise the errors that need no model."""
    from pydsa.text import grammars
    from pydsa.text.messages import check_functions
    grammars.llguidance()
    if restrictions.json_schema is not None:
        grammars.json_schema(restrictions.json_schema)
    if restrictions.grammar is not None:
        grammars.grammar(restrictions.grammar)
    if restrictions.tools is not None and not restrictions.tools:
        raise click.UsageError("--tools has no functions, expected a list of at least one.")
    check_functions(restrictions.tools, "--tools has")


def _read(option, path):
    """The text of an option's file."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_FILE + 1)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{option}: {path} is not UTF-8 text (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{option}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(data) > MAX_FILE:
        raise click.UsageError(f"{option}: {path} has more than {MAX_FILE} bytes, expected at most so many.")
    return text


def _json(text, source, what):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{source} is no JSON ({error}), expected {what}.") from error
