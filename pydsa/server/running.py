"""Run the server: in this process until a signal comes, or in a thread.

    with running(Settings(port=0), model) as url: ...
"""
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import socket
import threading

import uvicorn

from pydsa.chat import thinking_note
from pydsa.errors import PydsaError
from pydsa.server.app import make_app
from pydsa.server.guard import is_loopback, log
from pydsa.server.protocol import protocol_class
from pydsa.server.service import Service
from pydsa.server.settings import MAX_HEAD
from pydsa.terminal import visible

MAX_CONNECTIONS = 900       # open files of a process are often limited to 1024
KEEP_ALIVE = 30             # seconds that a connection may stay idle
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8      # of glibc's malloc.h
AFTER = 5                   # seconds for the last responses, once all answers have ended


class Server(uvicorn.Server):
    """uvicorn's server, which first lets answers finish when it ends.

    A second signal ends it at once.
    """

    def __init__(self, settings):
        self.service, self.failure, self._settings = Service(settings), None, settings
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)       # its messages have a form of their own
        logging.getLogger("asyncio").setLevel(logging.ERROR)                # it warns of each client that left
        config = uvicorn.Config(make_app(self.service), http=protocol_class(settings.timeout), ws="none", loop="asyncio", lifespan="off",
                                log_config=None, access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE, proxy_headers=False,
                                limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEAD,
                                timeout_graceful_shutdown=int(settings.timeout) + AFTER)
        super().__init__(config)
        self.sockets = open_sockets(settings.host, settings.port)
        host, port = self.sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"      # where it listens; sockets that are closed do not tell

    def load(self, load, done=lambda: None):
        """Load the model, load(), and begin to answer; an error ends the server.

        done() is called before it says that it is ready.
        """
        try:
            model = load()
            self.service.start(model)
            done()
            note = thinking_note(model.tokenizer, self._settings.thinking, self._settings.template)
            log(f"ready: {self.service.name} at {self.url}" + (f" ({visible(note)})" if note else ""))
        except BaseException as error:      # whoever runs the server raises it
            self.failure, self.should_exit = error, True

    def handle_exit(self, sig, frame):
        """A signal came: end soon, or at once if it is the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets=None):
        """Take no more requests, and let what runs finish."""
        if self.failure is None:
            log(f"stopping; running answers may take {self._settings.timeout:g} s more, a second signal ends them")
        ending = asyncio.create_task(asyncio.to_thread(self.service.close, self._settings.timeout))
        await super().shutdown(sockets)
        await ending


def open_sockets(host, port):
    """Sockets that are bound to all addresses of a host.

    Raises PydsaError if the host is unknown, or the port is taken.
    """
    sockets = []
    try:
        places = dict.fromkeys((family, address[0]) for family, _, _, _, address in
                               socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
        for family, address in places:
            sockets.append(socket.create_server((address, port), family=family))
            port = port or sockets[0].getsockname()[1]
        return sockets
    except (OSError, UnicodeError, OverflowError) as error:
        for one in sockets:
            one.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise PydsaError(f"The server cannot listen on {host}, port {port} ({reason}); choose others with --host and --port.") from error


def _steady_memory():
    """Let glibc give back what requests have used.

    By itself it keeps an arena for each thread, and raises the size from which memory is given back at once: a server of many requests of
    different sizes would grow for hours. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 1 << 18), (M_TRIM_THRESHOLD, 1 << 18)):
            mallopt(parameter, value)


def _steady_collector():
    """Let Python's collector of cycles pass over the model and its code.

    They last as long as the process. It would look at their 174,000 objects for 90 ms, again and again, in which no other thread runs
    Python.
    """
    gc.collect()
    gc.freeze()


def serve(settings, load):
    """Serve the model that load() returns until a signal comes.

    Raises PydsaError if it cannot be loaded, or the port is taken.
    """
    _steady_memory()
    server = Server(settings)
    log(f"listening at {server.url}")
    if not is_loopback(settings.host) and not settings.keys:
        log(f"warning: anybody who can reach {settings.host} can use this server; give it --api-key, or leave out --host")
    loading = threading.Thread(target=server.load, args=(load, _steady_collector), name="pydsa loading", daemon=True)
    loading.start()
    server.run(server.sockets)
    if server.failure is not None:
        raise server.failure
    if loading.is_alive():      # compiling cannot be interrupted
        os._exit(0)


@contextlib.contextmanager
def running(settings, model=None):
    """A context with a running Server; model: None: it goes on loading.

    Its `url` is where it listens. Call server.load() to end the loading.
    """
    server = Server(settings)
    if model is not None:
        server.service.start(model)
    thread = threading.Thread(target=server.run, args=(server.sockets,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()
