"""Post: calls on the threads of event loops, in order, also where no pipe wakes them and where the loop has ended."""
import asyncio
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")
from pydsa.server import post as module  # noqa: E402
from pydsa.server.post import Post  # noqa: E402


@pytest.fixture(params=["pipe", "no pipe"])
def post(request, monkeypatch):
    if request.param == "no pipe":
        monkeypatch.setattr(module, "os", SimpleNamespace(name="nt"))
    elif module.os.name != "posix":
        pytest.skip("loops wait for no pipes here")
    return Post()


def test_calls_come_in_order_on_the_loops_thread(post):
    """All that are sent, by a thread that is faster than the loop."""
    met = []

    async def listen():
        loop, last = asyncio.get_running_loop(), asyncio.Event()

        def send():
            for i in range(3000):
                post.send(loop, lambda i: met.append((i, threading.current_thread())), i)
            post.close()
            loop.call_soon_threadsafe(last.set)
        sender = threading.Thread(target=send)
        sender.start()
        await asyncio.wait_for(last.wait(), 20)
        sender.join()
    asyncio.run(listen())
    assert met == [(i, threading.current_thread()) for i in range(3000)]


def test_a_loop_that_has_ended_is_not_called(post):
    met, loop = [], asyncio.new_event_loop()
    post.send(loop, met.append, 1)
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    post.send(loop, met.append, 2)
    post.close()
    assert met == [1]
