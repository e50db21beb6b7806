"""Connections: what uvicorn's HTTP/1.1 does not bound or say.

A client has a time to send its request in, and to take what is written for it. What is no HTTP, or ends in the middle of a request, gets a
response in the form of the APIs.
"""
import json
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pydsa.server.errors import ApiError, error_body
from pydsa.server.guard import log
from pydsa.server.settings import MAX_HEAD

BAD_HTTP = "This is not an HTTP request that the server can read"


def protocol_class(timeout):
    """The class of connections for uvicorn; timeout: seconds."""
    return type("Protocol", (Connection,), {"timeout": timeout})


class Connection(H11Protocol):
    """A connection of one client."""
    timeout = 60.0
    _deadline = _unread = None      # timers: for the request, and for what is written

    def connection_made(self, transport):
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.app_state = self.app_state | {"connection": self}      # each request finds it in its scope, as its "state"
        self._watch()

    def connection_lost(self, exc):
        """The connection is closed."""
        self._stop("_deadline")
        self._stop("_unread")
        super().connection_lost(exc)

    def data_received(self, data):
        """Some bytes came."""
        super().data_received(data)
        self._watch()

    def eof_received(self):
        """The client closed its side; whoever closes it early has gone."""
        if self._incomplete:
            self._refuse(400, "The request ends in the middle, expected all of it.")

    def pause_writing(self):
        """The client does not take what is written."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.timeout, self.transport.abort)

    def resume_writing(self):
        """The client takes it again."""
        super().resume_writing()
        self._stop("_unread")

    @property
    def takes_parts(self):
        """Whether write_part() may be called.

        It may within a body in chunks, while the client takes what is written.
        """
        return (self.conn.our_state is h11.SEND_BODY and self.conn.their_http_version == b"1.1" and not self.flow.write_paused
                and not self.transport.is_closing())

    def write_part(self, data):
        """Write a part of a body of unknown length, as its cycle's send() would.

        Through the layers of ASGI and h11 a token takes three times as long. Nothing must wait there.
        """
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    @property
    def _incomplete(self):
        """Whether a request has begun to come and is not complete."""
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] != b""
        return begun or self.conn.their_state is h11.SEND_BODY

    def _watch(self):
        """Let a timer run exactly while a request is awaited or comes."""
        new = self.cycle is None        # a new connection; on others uvicorn waits for the next request to begin
        if not (new or self._incomplete):
            self._stop("_deadline")
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.timeout, self._late)

    def _late(self):
        self._deadline = None
        self._refuse(408, f"The request was not complete after {self.timeout:g} s.")

    def _stop(self, name):
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg):
        """Refuse what is no HTTP; called where h11's error is handled."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        sentence = f"The request line and headers have more than {MAX_HEAD >> 10} KiB." if status == 431 else f"{BAD_HTTP} ({error})."
        self._refuse(status, sentence)

    def _refuse(self, status, sentence):
        """Answer with an error, if no answer has begun, and close."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle is not None:
                self.cycle.disconnected = True      # what runs for it must not write a second response
            body = json.dumps(error_body(self._path, ApiError(status, sentence))).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
            for event in (h11.Response(status_code=status, headers=head), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            log(f"connection refused with {status}: {sentence}")
        self.transport.close()

    @property
    def _path(self):
        return self.scope["path"] if self.scope is not None and self.conn.their_state is not h11.IDLE else ""
