"""Errors as the APIs write them: a status, and a body with one sentence."""
import re
import traceback

from starlette.responses import JSONResponse

from pydsa.engine.requests import Cancelled, InternalError, QueueFullError
from pydsa.errors import ContextFullError, DamagedWeightsError, LostFileError, OutOfMemoryError, PydsaError, StageError, sentence

# OpenAI's and Anthropic's types by status.
OPENAI = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error"}
ANTHROPIC = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 500: "api_error", 503: "overloaded_error", 529: "overloaded_error"}
RETRY_AFTER = 2     # seconds
NO_THREADS = "thread_unsupported_request"       # tells Anthropic's clients to send whole conversations


class ApiError(Exception):
    """An error that a client is told.

    status: of HTTP. message: a sentence. param: the field that is at fault. code: a short name, where OpenAI's API has one.
    """

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def headers(self):
        """Headers of the response, beside those of its body."""
        return {"retry-after": str(RETRY_AFTER)} if self.status in (429, 503) else {}


NODE = re.compile(r"(\(layers? [^(),]*), node [^()]*\)")        # in the names of stages: addresses are no client's business


def as_api_error(error):
    """The ApiError that tells of an exception.

    Any but a PydsaError is a fault of this program, and is also written to stderr with its traceback.
    """
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, PydsaError):
        traceback.print_exception(error)
        return ApiError(500, "The server failed; its log has the reason.")
    text = NODE.sub(r"\1)", sentence(error))
    if "_" not in text.split()[0]:      # the name of a field stays as it is
        text = text[:1].upper() + text[1:]
    if isinstance(error, QueueFullError):
        return ApiError(429, text, code="queue_full")
    if isinstance(error, ContextFullError):
        return ApiError(400, text, code="context_length_exceeded")
    if isinstance(error, Cancelled):
        return ApiError(503, "The answer was ended: the server stops, or the client did not read it.")
    if isinstance(error, StageError):       # its text has addresses of nodes
        return ApiError(500, "A part of the model has failed, on this machine or another one; the server's log has it.")
    if isinstance(error, LostFileError):
        return ApiError(500, "The model's file cannot be read any more: it was cut off or overwritten, or its drive fails; start the "
                             "server again.")
    if isinstance(error, (DamagedWeightsError, OutOfMemoryError, InternalError)):
        return ApiError(500, text)
    return ApiError(400, text)


def for_anthropic(path):
    """Whether a path belongs to Anthropic's API."""
    return path.startswith(("/v1/messages", "/messages"))


def error_body(path, error):
    """The body that tells of an ApiError, in the form of the path's API."""
    if for_anthropic(path):
        kind = ANTHROPIC.get(error.status, "invalid_request_error")
        details = {"details": {"error_code": error.code}} if error.code == NO_THREADS else {}
        return {"type": "error", "error": {"type": kind, "message": error.message, **details}}
    kind = OPENAI.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(path, error):
    """The response that tells of an ApiError."""
    return JSONResponse(error_body(path, error), error.status, error.headers)
