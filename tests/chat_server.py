"""A server that answers the chat page with what a test wrote before.

    with ChatServer() as server:
        server.says = ["Hello", {"content": " again"}, OK]
"""
import asyncio
import functools
import json
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from pydsa.server.page import page

OK = {"usage": {"prompt_tokens": 40, "completion_tokens": 60, "total_tokens": 100, "prompt_tokens_details": {"cached_tokens": 8}},
      "timings": {"predicted_per_second": 123.4}}
HOLD, BREAK = "hold", "break"       # wait until the client goes or hold is set; end the stream without its end

# What a model may write: code and a table; all of Markdown; and what would run or load something, were it HTML.
SOURCE = "def f(x):\n\treturn x < 1  # <b>\n"
CODE = f"Some code:\n\n```python\n{SOURCE}```\n\n| a | b |\n|---|--:|\n| 1 | `2` |\n\n1. one\n   - *two*\n2. **three**\n"
MARKDOWN = CODE + """
# Title #
> quote
goes on

Text with `code`, ~~old~~ and [a link](https://example.org/a_(b)), <https://example.org>.
A_b_c *not closed, 2 * 3, **结论：**好 \\*as it is\\*

- loose

  more
- [x] done
  ```sh
  echo 1
  ```
***
5) five
| a | b |
| c | d |

~~~
``` no end
"""
EVIL = """<script>hit("script")</script> <img src="//example.com/a.png" onerror='hit("img")'> <b onclick=hit()>bold</b>

[one](javascript:hit) [two](JaVaScRiPt:hit('x')) [three](data:text/html,x) [four](//example.com) ![five](https://example.com/b.png)
<javascript:hit()> [six](<java\tscript:hit()>) [seven](vbscript:x "title") &lt;script&gt; &#106;avascript:hit()

```"><img src=x onerror=hit()>
</code></pre><script>hit("code")</script>
```

| <img src=x onerror=hit()> | [a](javascript:hit()) |
|---|---|
| <svg onload=hit()> | **<iframe src=javascript:hit()>** |

# <style>*{display:none}</style>
- <a href="javascript:hit()">x</a>
"""


def error(status, sentence):
    """An error of OpenAI's API."""
    return JSONResponse({"error": {"message": sentence, "type": "any", "param": None, "code": None}}, status)


class ChatServer:
    """A running server; a context.

    says: what it streams: texts, deltas, chunks without choices, (HOLD,) and (BREAK,). fails: (status, sentence) in the place of an
    answer. loading: whether it still loads. key: what clients must have. bodies: what was asked. n_gone: clients that left an answer.
    """

    def __init__(self):
        self.says, self.fails, self.loading, self.key, self.bodies, self.n_gone = [OK], None, False, None, [], 0
        self.release = threading.Event()
        routes = [Route("/", functools.partial(page, None)), Route("/health", self._checked(self._health)),
                  Route("/v1/models", self._checked(self._models)),
                  Route("/v1/chat/completions", self._checked(self._chat), methods=["POST"])]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off"))
        self._socket = uvicorn.Config(None, port=0, log_config=None).bind_socket()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised):
        self._server.should_exit = self._server.force_exit = True
        self.release.set()
        self._thread.join(20)
        self._socket.close()

    def _checked(self, endpoint):
        async def answer(request):
            if self.loading:
                return error(503, "The model is being loaded; try again soon.")
            if self.key and request.url.path != "/health" and request.headers.get("authorization") != f"Bearer {self.key}":
                return error(401, "There is no API key, expected one as Authorization: Bearer KEY.")
            return await endpoint(request)
        return answer

    async def _health(self, request):
        return JSONResponse({"status": "ok"})

    async def _models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "object": "model", "meta": {"n_ctx": 4096}}]})

    async def _chat(self, request):
        self.bodies.append(await request.json())
        return error(*self.fails) if self.fails else StreamingResponse(self._stream(self.says), media_type="text/event-stream")

    async def _stream(self, says):
        try:
            for part in says:
                if part == (HOLD,):
                    while not self.release.is_set():
                        await asyncio.sleep(0.01)
                elif part == (BREAK,):
                    return
                else:
                    yield f"data: {json.dumps(self._chunk(part))}\n\n"
                    await asyncio.sleep(0)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.n_gone += 1
            raise

    @staticmethod
    def _chunk(part):
        delta = {"content": part} if isinstance(part, str) else part
        if {"usage", "error", "prompt_progress", "choices"} & set(delta):
            return {"choices": []} | delta
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
