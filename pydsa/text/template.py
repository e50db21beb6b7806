"""Render the chat templates of files in jinja2's sandbox.

A template is a program from an untrusted file: its time and its text are limited. No text and no list may grow without bound. The result of
every operation that makes one is measured. Operations that can make a huge one in a single step are checked before they run (*, join,
replace) or are not available (format, center, ...).
"""
import functools
import json
import operator
import sys
import time
from contextlib import contextmanager
from datetime import datetime

from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.text.messages import Arguments

MAX_TEMPLATE = 1 << 18      # characters; the templates of the supported models have a few thousand
MAX_TEXT = 8_000_000        # characters of the prompt, and of every intermediate string
MAX_BITS = 4096             # of an integer
MAX_SECONDS = 3.0           # to compile and to render

_STRING_METHODS = ("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
                   "isspace", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind",
                   "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper")
_UNAVAILABLE_FILTERS = ("attr", "batch", "center", "filesizeformat", "format", "indent", "pprint", "random", "slice",
                        "sum", "truncate", "urlize", "wordwrap", "xmlattr")


class _LimitError(Exception):
    """The template exceeds a limit."""


class _RefusalError(Exception):
    """The template refuses these messages."""


def _check_size(n):
    if n > MAX_TEXT:
        raise _LimitError(f"it makes more than {MAX_TEXT} characters")


def _fits(value):
    """The value, if it is not too large when written out."""
    if isinstance(value, (str, list, tuple, dict)):
        _check_size(_weight(value, {}))
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _LimitError(f"it makes an integer of more than {MAX_BITS} bits")
    return value


def _weight(value, weights):
    """Characters and elements of a value at any depth.

    An object that occurs twice counts twice, but is visited once. weights: id of an object -> its weight.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if id(value) not in weights:
        parts = [part for item in value.items() for part in item] if isinstance(value, dict) else value
        weights[id(value)] = 1 + sum(_weight(part, weights) for part in parts)
    return weights[id(value)]


class _Growing(list):
    """A list that a template has made, to which it may append.

    Other lists, dicts and tuples hold a copy of it, so that nothing that was measured grows afterwards.
    """

    def append(self, value):
        super().append(_copied(value))
        _fits(self)


def _copied(value):
    return list(value) if isinstance(value, _Growing) else value


def _bounded(function):
    return functools.wraps(function)(lambda *args, **kwargs: _fits(function(*args, **kwargs)))


def _concat(strings):
    pieces, n = [], 0
    for piece in strings:
        n += len(piece)
        _check_size(n)
        pieces.append(piece)
    return "".join(pieces)


def _join(separator, values):
    values = [str(value) for value in values]
    _check_size(sum(map(len, values)) + len(separator) * len(values))
    return separator.join(values)


def _replace(text, old, new, count=None):
    text, old, new = str(text), str(old), str(new)      # as jinja2's own filter does
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _multiply(left, right):
    for sequence, times in (left, right), (right, left):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            _check_size(len(sequence) * times)
    return _fits(left * right)


def _remainder(left, right):
    if isinstance(left, str):
        raise _LimitError("it formats a text with %")
    return left % right


def _power(left, right):
    raise _LimitError("it computes a power")


def _refuse(message):
    raise _RefusalError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if indent is not None and indent not in range(17):
        raise _LimitError(f"it indents by {indent!r:.80}")
    if isinstance(value, Arguments) and (ensure_ascii, indent, separators, sort_keys) == (False, None, None, False):
        return str(value)       # with the caller's spaces and escapes
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _from_json(plain, text):
    """The value of a JSON text, with its strings marked by plain().

    Arguments of calls are such a value already.
    """
    return text if isinstance(text, Arguments) else plain(json.loads(text))


def _code_generator():
    """The class that compiles templates to Python.

    Texts that are concatenated, and lists, tuples and dicts, are measured as they are made.
    """
    from jinja2.compiler import CodeGenerator

    class Generator(CodeGenerator):
        def visit_Concat(self, node, frame):    # a ~ b
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

        def measured(self, visit, node, frame):     # a list, tuple or dict
            self.write("environment.fits(")
            visit(node, frame)
            self.write(")")

        def visit_List(self, node, frame):
            self.measured(super().visit_List, node, frame)

        def visit_Tuple(self, node, frame):
            if node.ctx == "load":
                self.measured(super().visit_Tuple, node, frame)
            else:       # the targets of an assignment
                super().visit_Tuple(node, frame)

        def visit_Dict(self, node, frame):
            self.measured(super().visit_Dict, node, frame)

    return Generator


def _flat_namespace():
    """The class of a template's namespaces, which hold no other namespace."""
    from jinja2.utils import Namespace

    class FlatNamespace(Namespace):
        """A namespace that holds no other namespace.

        So none can grow by being held twice.
        """

        def __init__(self, *args, **kwargs):
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(value, Namespace):
                raise _LimitError("it puts a namespace into another")
            super().__setitem__(name, value)

    return FlatNamespace


def _generation_blocks():
    """The extension of {% generation %}...{% endgeneration %}.

    The transformers library marks with it what the assistant wrote, to train on it; here it is as if the tags were not there.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


@functools.lru_cache(maxsize=1)
def _sandbox():
    """The class of the environment that templates run in.

    It is made when it is needed, as jinja2 is slow to import.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
    flat_namespace, generation_blocks = _flat_namespace(), _generation_blocks()

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = _code_generator()

        concat = staticmethod(_concat)
        intercepted_binops = frozenset(("+", "*", "%", "**"))

        def __init__(self, plain):
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation_blocks],
                             optimized=False)     # constant lists too are made by fits()
            self.binop_table |= {"+": _bounded(operator.add), "*": _multiply, "%": _remainder, "**": _power}
            self.filters |= {"join": self.join, "replace": _replace, "tojson": _tojson,
                             "from_json": functools.partial(_from_json, plain)}
            self.filters = {name: _bounded(function) for name, function in self.filters.items()
                            if name not in _UNAVAILABLE_FILTERS}
            del self.globals["lipsum"]
            self.globals |= {"namespace": flat_namespace, "dict": lambda *args, **kwargs: self.fits(dict(*args, **kwargs)),
                             "raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

        def join(self, values, separator="", attribute=None):
            values = values if attribute is None else (self.getitem(value, attribute) for value in values)
            return _join(separator, values)

        @staticmethod
        def fits(literal):
            """A list, tuple or dict of the template, if it is not too large."""
            if any(isinstance(part, Namespace) for part in (literal.values() if isinstance(literal, dict) else literal)):
                raise _LimitError("it puts a namespace into a list")
            if isinstance(literal, dict):
                return _fits({key: _copied(value) for key, value in literal.items()})
            return _fits((_Growing if isinstance(literal, list) else tuple)(map(_copied, literal)))

        def is_safe_attribute(self, obj, attr, value):
            if isinstance(obj, (str, bytes, int, float)):
                return isinstance(obj, str) and attr in _STRING_METHODS
            if isinstance(obj, _Growing) and attr in ("append", "pop"):
                return True
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value):
            return None

        def getattr(self, obj, attribute):
            if isinstance(obj, str) and attribute in ("join", "replace"):
                return functools.partial(_join if attribute == "join" else _replace, obj)
            return super().getattr(obj, attribute)

    return Sandbox


@contextmanager
def _deadline(seconds):
    """A context that raises _LimitError after this many seconds.

    A thread cannot be stopped, and only the main thread receives signals. But a trace function is called for every line of Python, and may
    raise. This includes the loops of a template, which jinja2 compiles to Python.
    """
    end = time.monotonic() + seconds

    def trace(frame, event, argument):
        if frame.f_code.co_filename == __file__:
            return None     # the functions of this file end by themselves, and run faster without tracing
        if time.monotonic() > end:
            raise _LimitError(f"it takes more than {seconds} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def check_source(source, tokenizer):
    """Raise UnsupportedModelError if `source` is no text, or a huge one."""
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        raise UnsupportedModelError(f"{tokenizer.path}: the chat template is {source!r:.80}, "
                                    f"expected a text of at most {MAX_TEMPLATE} characters")


def render(source, tokenizer, plain, variables):
    """The text that the template `source` makes of the variables.

    plain() is applied to the values that the template parses from JSON. Raises PydsaError if the template refuses the messages, and
    UnsupportedModelError if it fails or exceeds a limit.
    """
    check_source(source, tokenizer)
    for name, token_id in ("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id):
        variables[name] = "" if token_id is None else tokenizer.tokens[token_id]
    environment = _sandbox()(plain)
    try:
        with _deadline(MAX_SECONDS):
            return environment.from_string(source.removeprefix("\ufeff")).render(variables)      # some editors begin files with it
    except _LimitError as error:
        raise UnsupportedModelError(f"{tokenizer.path}: the chat template is stopped, as {error}") from None
    except Exception as error:      # a template may raise any exception
        reason = " ".join(str(error).split())
        if isinstance(error, _RefusalError):
            raise PydsaError(f"{tokenizer.path}: the chat template refuses these messages: {reason:.200}") from None
        raise UnsupportedModelError(f"{tokenizer.path}: the chat template fails with {type(error).__name__}: "
                                    f"{reason:.200}") from error
