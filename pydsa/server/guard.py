"""Who may ask: hosts, origins and keys; and the line in the log that every request gets.

Pages in a browser could reach a server on this machine: by another name that leads here (DNS rebinding), or by a request across origins.
The headers Host and Origin tell, so that both are checked before anything else.
"""
import hmac
import ipaddress
import json
import re
import sys
import time

from starlette.datastructures import Headers

from pydsa.server.errors import ApiError, error_response
from pydsa.terminal import visible

OPEN = ("/", "/index.html", "/health", "/v1/health")       # no key is needed: they tell nothing
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/?#@\s]+))(?::[0-9]*)?")
GONE = 499          # what the log says of a client that went away


def host_name(text):
    """The name in a Host header, without port and brackets; "" if none."""
    match = _HOST.fullmatch(text)
    return "" if match is None else (match[1] or match[2]).lower().removesuffix(".")


def is_loopback(name):
    """Whether a name or address leads to this machine only."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def is_address(name):
    """Whether a name is an IP address, to which no other name can be bound."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """An ASGI app before another one: refuses other hosts and origins."""

    def __init__(self, app, settings):
        self._app, self._settings = app, settings
        self._names = {settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        self._public = not is_loopback(settings.host)

    async def __call__(self, scope, receive, send):
        try:
            self._check(Headers(scope=scope))
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers):
        host, origin = headers.get("host"), headers.get("origin")
        name = None if host is None else host_name(host)
        if name is not None and not (name in self._names or is_loopback(name) or self._public and is_address(name)):
            raise ApiError(403, f"The host {visible(host):.80} is not one of this server's names; start it with --allowed-host "
                                f"{visible(name) or 'NAME':.80}.")
        allowed = self._settings.cors_origins
        if origin is not None and "*" not in allowed and origin not in allowed and origin.partition("://")[2] != host:
            raise ApiError(403, f"Pages of {visible(origin):.80} may not use this server; start it with --cors-origin "
                                f"{visible(origin):.80}.")


class Keys:
    """An ASGI app before another one: refuses requests without a key."""

    def __init__(self, app, keys):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope, receive, send):
        if not self._keys or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        # Some clients send a dummy as one, and the key as the other.
        given = [key for key in (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")) if key]
        # All keys are compared, each in a time that does not depend on where they differ.
        right = [one for one in given if sum(hmac.compare_digest(key, one.encode("latin-1")) for key in self._keys)]
        if not right:
            message = "The API key is wrong." if given else "There is no API key, expected one as Authorization: Bearer KEY."
            await error_response(scope["path"], ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
            return
        scope["pydsa.key"] = right[0]
        await self._app(scope, receive, send)


class Paths:
    """An ASGI app before another one: paths as clients put them together.

    Addresses end with a slash or not, with /v1 or not, and clients add what they think is missing; a proxy gets the address with its host.
    """

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope = scope | {"path": self.plain(scope["path"])}
        await self._app(scope, receive, send)

    @staticmethod
    def plain(path):
        """A path without a host, superfluous slashes, and a doubled /v1."""
        path = re.sub(r"^/*https?://[^/]*", "", path)
        path = re.sub(r"^(/v1)+(?=/v1/)", "", re.sub("/+", "/", path))
        return path.rstrip("/") or "/"


class Log:
    """An ASGI app around the others: one line for each request, errors in the APIs' form."""

    def __init__(self, app, service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        start, status = time.monotonic(), None
        scope["pydsa.log"], scope["pydsa.service"] = {}, self._service

        async def watched(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
        try:
            await self._app(scope, receive, watched)
        finally:
            for answers in scope.get("pydsa.answers", ()):
                answers.close()
            self._write(scope, GONE if status is None else status, time.monotonic() - start)

    def _write(self, scope, status, seconds):
        route = scope.get("pydsa.route")
        self._service.metrics.note_request(scope["method"] if route else "other", route or "other", status, seconds)
        line = json_line if self._service.settings.json_log else text_line
        log(line(scope["method"], scope["path"], status, seconds, scope["pydsa.log"]))


def log(line):
    """Write a line to stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def speeds(timings):
    """Tokens a second of a prompt and of an answer, or None."""
    n = timings.n_prompt - timings.n_reused
    return (n / timings.prompt if n and timings.prompt else None,
            (timings.n_generated - 1) / timings.generation if timings.n_generated > 1 and timings.generation else None)


def text_line(method, path, status, seconds, details):
    """A request as a line for a person."""
    parts = [f"{time.strftime('%H:%M:%S')} {method} {visible(path):.200} {status} {seconds:.2f} s"]
    if "n_prompt" in details:
        why = f" ({details['why']})" if details["why"] else ""
        parts.append(f"slot {details['slot']}, prompt {details['n_prompt']} tokens, {details['n_reused']} reused{why}")
    if "timings" in details:
        prompt, generation = ("-" if speed is None else f"{speed:.1f}" for speed in speeds(details["timings"]))
        parts.append(f"{prompt} t/s; generated {details['n_generated']}, {generation} t/s")
    if "error" in details:
        parts.append(visible(details["error"]))
    return "; ".join(parts)


def json_line(method, path, status, seconds, details):
    """A request as a line of JSON."""
    fields = {name: value for name, value in details.items() if name != "timings"}
    if "timings" in details:
        prompt, generation = speeds(details["timings"])
        fields |= {"prompt_per_second": prompt, "generated_per_second": generation, "queued": details["timings"].queued}
    return json.dumps({"time": time.time(), "method": method, "path": path, "status": status, "seconds": seconds} | fields)
