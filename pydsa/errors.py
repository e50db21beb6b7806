"""The errors that a user or a file can cause.

A message says what was met, what was expected and what to do: "n_ubatch is 40000, expected at most 32768 on cuda (-ub)".
"""

LESS = "ask for a smaller context (-c), a smaller ubatch (-ub) or a smaller cache type (--kv-type)"     # advice where memory is short
NOT_FINITE = "The logits are not finite: the weights are damaged, or a computation overflowed (`pydsa info --check` reads all of the file)."
UNMAPPED = "failed to map segment"      # what the system says of a library for which there is no memory


class PydsaError(Exception):
    """The base class of all errors with a cause outside of pydsa's code."""


class GGUFError(PydsaError):
    """The file is not a valid GGUF: damaged, inconsistent or incomplete."""


class LostFileError(PydsaError):
    """A file that a model reads in place cannot be read any more."""


class UnsupportedModelError(PydsaError):
    """The file is valid, but pydsa does not support the model.

    Its architecture, a tensor type, its tokenizer or its chat template is not supported.
    """


class ContextFullError(PydsaError):
    """The context has no room for the requested tokens."""


class DamagedWeightsError(PydsaError):
    """A result is not finite: the weights are damaged, or it overflowed."""


class ImatrixError(PydsaError):
    """An imatrix file is damaged, or that of another model."""


class CheckpointError(PydsaError):
    """A folder with a checkpoint is damaged, incomplete or contradictory."""


class TargetError(PydsaError):
    """A model file cannot be written, or would replace another."""


class SessionFileError(PydsaError):
    """A session file is damaged, or belongs to another model or cache type."""


class LogitsFileError(PydsaError):
    """A file of log-probabilities is damaged, or of another model or text."""


class RecordingFileError(PydsaError):
    """A recording's file is damaged, or cannot be read or written."""


class StageError(PydsaError):
    """A stage of a model, a process of its own, has failed."""


class OutOfMemoryError(PydsaError):
    """The request needs more memory than the machine has available."""


def sentence(error):
    """The message of an error with a full stop, as users read it.

    Messages of the modules at the bottom have none, as others are made of them.
    """
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def lacks_memory(error):
    """Whether an exception, or one that led to it, is a lack of memory.

    Where less is allowed than libraries take, importing them fails in many ways.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError) or isinstance(error, (ImportError, OSError)) and UNMAPPED in str(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
