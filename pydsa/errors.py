"""The errors that a user can cause. Each message is one sentence: what was met, what was expected, what to do."""

LESS = "ask for a smaller context (-c), a smaller chunk (-ub) or a smaller cache type (--kv-type)"      # where memory is short


class PydsaError(Exception):
    """The base of every error that pydsa raises for a mistake outside of its own code."""


class GGUFError(PydsaError):
    """The file is not a GGUF that can be trusted: damaged, inconsistent or incomplete."""


class UnsupportedModelError(PydsaError):
    """The file is sound, but its architecture, a tensor type or its tokenizer is not known here."""


class ContextFullError(PydsaError):
    """The context has no room for the tokens asked for."""


class SessionFileError(PydsaError):
    """A saved session is damaged, or was saved from another model or with another cache."""


class OutOfMemoryError(PydsaError):
    """What was asked for needs more memory than the machine has available."""
