"""What the endpoints share: the model, its engine, and answers that run."""
import asyncio
import contextlib
import dataclasses
import hashlib
import os
import time

from pydsa.chat import chat_prompt
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Cancelled, Failed, Finished, Request, Started, Written
from pydsa.errors import PydsaError, UnsupportedModelError
from pydsa.server.errors import ApiError, as_api_error
from pydsa.server.metrics import Metrics
from pydsa.server.post import Post

MOST_EVENTS = 4096      # of one request that its client has not read yet; more, and it ends


class Service:
    """The model behind the endpoints.

    settings: the Settings. model, engine: None until start() was called. metrics: the Metrics. body_bytes: of the bodies that are coming
    in.
    """

    def __init__(self, settings):
        self.settings, self.model, self.engine, self.post = settings, None, None, Post()
        self.body_bytes, self._closing = 0, False
        self.metrics, self.created, self.fingerprint = Metrics(self), int(time.time()), None

    def start(self, model):
        """Begin to answer with a model.

        Raises PydsaError if its sessions do not fit in memory, or the settings do not fit the model.
        """
        settings = self.settings
        if settings.template is not None:
            try:
                chat_prompt(model.tokenizer, [{"role": "user", "content": "?"}], template=settings.template)
            except UnsupportedModelError:
                raise
            except PydsaError:      # it refuses this conversation, and may take others
                pass
        if settings.slot_folder is not None:
            make_folder(settings.slot_folder)
        settings.sampling.check_vocabulary(model.config.n_vocab)
        self.fingerprint = f"pydsa-{model.setup.fingerprint[:12]}"
        engine = Engine(model, settings.n_parallel, settings.n_queue, settings.cache_bytes, settings.slot_folder)
        self.model, self.engine = model, engine
        if self._closing:       # meanwhile: close() may have found no engine
            engine.close()

    def close(self, timeout=0.0):
        """Take no more requests, and end those that run after `timeout` seconds."""
        self._closing = True
        if self.engine is not None:
            self.engine.close(timeout)
        self.post.close()

    @property
    def name(self):
        """The name of the model in answers."""
        if self.settings.alias is not None or self.model is None:
            return self.settings.alias or "loading"
        return os.path.basename(self.model.metadata.path).removesuffix(".gguf")

    def ready(self):
        """Raise ApiError if no request can be answered.

        The model is being loaded, one of its stages has failed for good, its file cannot be read any more, or the server stops.
        """
        if self._closing:
            raise ApiError(503, "The server stops, and takes no more requests.")
        if self.engine is None:
            raise ApiError(503, "The model is being loaded; try again soon.", code="loading")
        if (error := self.model.runner.error) is not None:
            raise as_api_error(error)

    async def chat_prompt(self, messages, thinking=None, tools=None, template_kwargs=None):
        """The chat.Prompt of a conversation, made on another thread.

        thinking: None: as the settings say. Raises the errors of chat.encode_chat.
        """
        self.ready()
        thinking = self.settings.thinking if thinking is None else thinking
        return await asyncio.to_thread(chat_prompt, self.model.tokenizer, messages, thinking=thinking, tools=tools,
                                       template=self.settings.template, template_kwargs=template_kwargs)

    @property
    def template(self):
        """The chat template, or None."""
        return self.model.tokenizer.chat_template if self.settings.template is None else self.settings.template

    async def tokenize(self, text, add_bos=None, parse_special=True):
        """The ids of a text, made on another thread."""
        self.ready()
        return await asyncio.to_thread(self.model.tokenize, text, add_bos, parse_special)

    def sampling(self, **options):
        """The Sampling of a request: what it gives, and the settings' for what is None."""
        return dataclasses.replace(self.settings.sampling, **{name: value for name, value in options.items() if value is not None})

    def answers(self, scope, requests):
        """Submit requests of the engine -> their Answers.

        requests: dicts of fields of Request, without its listener and owner. All are taken or none. Raises the errors of Engine.submit, and
        ApiError for more than can ever wait.
        """
        self.ready()
        room = self.settings.n_parallel + self.settings.n_queue
        if len(requests) > room:    # with 429 it would try again for ever
            raise ApiError(400, f"The request asks for {len(requests)} answers, expected at most {room}, as many as may run or wait: ask "
                                "for fewer, or start the server with a larger --queue.", "n", "invalid_value")
        answers = Answers(self, scope, len(requests))
        try:
            for i, fields in enumerate(requests):
                answers.submit(i, Request(listener=answers.listener(i), owner=owner_of(scope), **fields))
        except BaseException:
            answers.close()
            raise
        return answers


def make_folder(path):
    """Make a folder for saved slots, unless it is there; raises PydsaError."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
    except OSError as error:
        raise PydsaError(f"The folder for saved slots cannot be made ({error.strerror}), expected one that can be written: see "
                         "--slot-save-path.") from error


def owner_of(scope):
    """Who asks: a hash of the API key, or "" without keys."""
    key = scope.get("pydsa.key")
    return "" if key is None else hashlib.sha256(key.encode()).hexdigest()


class Answers:
    """The answers to some requests while they are generated.

    A client that does not read what is generated for it loses its answer: no more than MOST_EVENTS wait for it.
    """

    def __init__(self, service, scope, n):
        self._service, self._scope, self.n = service, scope, n
        self._loop, self._events, self._waiter = asyncio.get_running_loop(), [], None
        self._tickets, self._n_open, self._connection, self._text_of = [], n, None, None
        self._log = scope.setdefault("pydsa.log", {})
        scope.setdefault("pydsa.answers", []).append(self)      # closed at the end of the request, whatever ends it

    def submit(self, i, request):
        """Submit request i."""
        self._tickets.append(self._service.engine.submit(request))

    def listener(self, i):
        """The listener of request i, which the engine's thread calls."""
        return lambda event: self._service.post.send(self._loop, self._put, i, event)

    def stream(self, text_of):
        """Write what a token adds to a stream, text_of(i, event), as it is told.

        batches() then has only the other events, and tokens that the connection does not take at once. Answers that share a stream are
        left to it: what they add in a step is written together.
        """
        self._connection = self._scope.get("state", {}).get("connection") if self.n == 1 else None
        self._text_of = text_of

    def _written(self, i, event):
        """Whether an event was written to the connection: all before it were."""
        if self._connection is None or self._events or not isinstance(event, Written) or self._waiter is None or self._waiter.done() or (
                not self._connection.takes_parts):
            return False
        if text := self._text_of(i, event):
            self._connection.write_part(text.encode())
        return True

    def _put(self, i, event):
        try:
            if self._written(i, event):
                return
        except Exception as error:      # batches() raises it, where the stream can tell
            event = Failed(error)
        last = isinstance(event, (Finished, Failed))
        if last or len(self._events) < MOST_EVENTS:
            self._events.append((i, event))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        else:
            self.close()

    async def events(self):
        """Yield (i, event) as they come; see batches()."""
        async with contextlib.aclosing(self.batches()) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self):
        """Yield lists of (i, event) as they come, until all requests have ended.

        A list has what came since the last one, so that a client's slowness costs no time of others. Raises the ApiError of a request that
        failed. The other requests are cancelled then, as they are where nobody goes on to read.
        """
        try:
            while self._n_open:
                if not self._events:
                    self._waiter = self._loop.create_future()
                    await self._waiter
                batch, self._events, failed = self._events, [], None
                for n, (_, event) in enumerate(batch):
                    self._note(event)
                    self._n_open -= isinstance(event, Finished)
                    if isinstance(event, Failed):
                        batch, failed = batch[:n], event.error
                        break
                if batch:
                    yield batch
                if failed is not None:
                    raise as_api_error(failed)
        finally:
            self.close()

    async def finish(self):
        """Wait for all answers -> a list of (Finished, tokens).

        There is one for each request. tokens: the requests.Token of each sampled token, where log-probabilities were asked for. Raises as
        events() does.
        """
        ends, tokens = [None] * self.n, [[] for _ in range(self.n)]
        async with contextlib.aclosing(self.events()) as events:
            async for i, event in events:
                if isinstance(event, Finished):
                    ends[i] = event
                elif getattr(event, "token", None) is not None:
                    tokens[i].append(event.token)
        return list(zip(ends, tokens))

    def close(self):
        """End what still runs."""
        for ticket in self._tickets:
            ticket.cancel()

    def _note(self, event):
        """Keep what the log and the metrics tell of a request."""
        if isinstance(event, Started):
            self._log.setdefault("n_prompt", event.n_prompt)
            self._log.setdefault("n_reused", event.n_reused)
            self._log.setdefault("why", event.why)
            self._log.setdefault("slot", event.slot)
        elif isinstance(event, Finished):
            timings = event.timings
            self._log["n_generated"] = self._log.get("n_generated", 0) + timings.n_generated
            self._log["timings"] = timings
            self._service.metrics.note(timings)
        elif isinstance(event, Failed) and not isinstance(event.error, Cancelled):
            self._log["error"] = str(event.error)


async def unless_gone(request, work):
    """Await some work -> its result.

    Raises ClientGone if the client goes away first.
    """
    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ClientGone(Exception):
    """The client went away before its answer was complete."""
