"""The settings of a server, as `pydsa serve` takes them."""
from dataclasses import dataclass

from pydsa.errors import PydsaError
from pydsa.sampling import Sampling

MAX_BODY = 32 << 20         # bytes of a request's body
MAX_BODIES = 256 << 20      # bytes of all bodies that are coming in
MAX_VALUES = 4_000_000      # commas and brackets of a body, as each value takes far more memory than its text
MAX_HEAD = 64 << 10         # bytes of a request line with its headers
MAX_CHOICES = 128           # answers to one request
MAX_DEPTH = 200             # levels of a body: some schemas are deep, but none by hundreds


def read_keys(given, path=None):
    """API keys -> a tuple of them: those given, and the lines of a file.

    Raises PydsaError for a file that cannot be read, and for keys that no header can hold.
    """
    keys = list(given)
    if path is not None:
        try:
            with open(path, encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise PydsaError(f"The API keys cannot be read from {path} ({getattr(error, 'strerror', None) or 'it is no text'}).") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise PydsaError(f"There is no API key in {path}, expected one a line.")
        keys += lines
    for i, key in enumerate(keys):
        if not key or key != key.strip() or not key.isprintable():
            raise PydsaError(f"API key {i + 1} is empty or has spaces at its ends or control characters, expected text without them.")
    return tuple(dict.fromkeys(keys))


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts.

    keys: API keys, of which a request must have one; none: any request is answered. cors_origins: origins whose pages may use the server,
    ("*",): all. allowed_hosts: names, beside those of this machine, by which clients may call it. alias: the model's name in answers; None:
    that of its file. n_parallel, n_queue: answers at the same time, and requests that wait beside them. cache_bytes: memory for
    conversations that no slot holds. slot_folder: where slots are saved, and where conversations go when that memory is full. timeout:
    seconds in which a client must have sent its request, must take what is written for it, and running answers may still finish at the end.
    max_tokens, sampling, thinking: for requests that do not say. template: a chat template instead of the file's. json_log: write the log
    as lines of JSON.
    """
    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple = ()
    cors_origins: tuple = ()
    allowed_hosts: tuple = ()
    alias: str | None = None
    n_parallel: int = 1
    n_queue: int = 64
    cache_bytes: int = 8 << 30
    slot_folder: str | None = None
    timeout: float = 60.0
    max_tokens: int | None = None
    sampling: Sampling = Sampling(temperature=1.0, top_p=1.0)       # these two are defaults of OpenAI's API
    thinking: bool = False
    template: str | None = None
    json_log: bool = False
