"""tools/serve_soak.py: a short soak of a server, and what it tells of servers that do wrong."""
import http.client
import json

import pytest
from click.testing import CliRunner
from serving import TINY, address, serving, wait_for

from tools.serve_soak import Soak, Worker, Wrong, answers_alone, at_the_end, can_call, curve, grown, main, too_much
from tools.soak_requests import CHAT, KEYS, MESSAGES, TEXT, Ask, Catalogue, streamed_answer, whole_answer, why_not_refused

N_CTX, N_LONG = 2048, 20


@pytest.fixture(scope="module")
def model(small_model, load):
    return load(small_model(**TINY), n_ctx=N_CTX, device="reference", threads=None)


@pytest.fixture(scope="module")
def alone(model):
    """Requests, and their answers by a server with one slot and no cache."""
    with serving(model, n_parallel=1, cache_bytes=0, keys=KEYS, timeout=20.0) as server:
        port = address(server)[1]
        assert not can_call(Worker(Soak(port, 1, [], [])))      # of a model without a template
        asks = Catalogue(1, 40, False, N_LONG).asks
        return asks, answers_alone(port, asks)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, n_parallel=3, n_queue=4, cache_bytes=1 << 16, keys=KEYS, timeout=20.0,
                 slot_folder=str(tmp_path_factory.mktemp("slots"))) as server:
        yield server


def test_a_short_soak(server, alone):
    """Clients come and go; whoever stays gets the answer given alone."""
    soak = Soak(address(server)[1], 1, *alone)
    soak.run(range(150), 8)
    assert soak.failures == [] and list(at_the_end(soak)) == []
    assert soak.n_done == 150 and soak.counts["answered as alone"] > 60 and soak.counts["refused"] > 5
    ways = {"went away in the request", "went away before the first byte", "went away in the answer", "refused as no HTTP"}
    assert ways <= set(soak.counts)
    wait_for(lambda: server.service.engine._n_open == 0)
    assert server.service.engine.stats.n_cancelled > 0


def test_a_failure_is_named_and_comes_again(server, alone):
    """An answer that is not the one given alone: the number is enough to ask for it again."""
    asks, expected = alone
    wrong = [answer | {"n": [0, 0]} if ask.path == CHAT else answer for ask, answer in zip(asks, expected)]
    soak, told = Soak(address(server)[1], 1, asks, wrong), []
    soak.run(range(20), 4, told.append)
    assert len(told) == len(soak.failures) > 0 and all(words.startswith(f"POST {CHAT}") for _, words in soak.failures)
    number, words = soak.failures[0]
    assert soak.told(number, words) in told and f"--seed 1 --only {number})" in told[0] and '"n": [0, 0]' in words
    again = Soak(address(server)[1], 1, asks, wrong)
    again.run([number], 1)
    assert again.failures == [(number, words)]


def test_a_slot_that_stays_busy_is_found(server, alone):
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    body = {"prompt": "a", "max_tokens": 400, "logit_bias": {"1": False}, "stream": True}
    connection.request("POST", TEXT, json.dumps(body), {"Authorization": f"Bearer {KEYS[0]}"})
    connection.getresponse().read1(1)
    problems = list(at_the_end(Soak(address(server)[1], 1, [], []), seconds=0))
    connection.close()
    assert "are busy, 0 s after the last client left" in problems[0] and "'requests_processing': 1.0" in problems[1]
    assert list(at_the_end(Soak(address(server)[1], 1, [], []))) == []


def test_a_server_that_is_gone():
    soak = Soak(1, 1, [Ask("/tokenize", {"content": "a"})], [{"tokens": [5]}])
    soak.run(range(20), 4)
    assert len(soak.failures) == 20 and not soak.counts
    with pytest.raises(Wrong, match="no response"):
        Worker(soak).answer(soak.asks[0])


@pytest.mark.parametrize("status, body, words", [
    (400, b'{"error": {"message": "It is wrong."}}', ""), (500, b'{"error": {"message": "It is wrong."}}', "status 500"),
    (400, b'{"error": {"message": "a\\nb"}}', "no sentence"), (400, b"Traceback", "tells no error"),
    (400, b'{"error": "x"}', "tells no error")])
def test_refusals(status, body, words):
    assert words in why_not_refused(status, 400, body) and bool(words) == bool(why_not_refused(status, 400, body))


def test_memory_is_compared_after_the_first_fifth():
    flat = [(i, 500 << 20 if i > 1000 else i << 19) for i in range(10_000)]
    assert not too_much(*grown(flat, 10_000)) and curve(flat, 10_000, 10).split() == ["500"] * 10
    leaking = [(i, (500 << 20) + 2048 * i) for i in range(10_000)]
    assert too_much(*grown(leaking, 10_000))
    assert grown(flat[:100], 100) is None and curve([], 5, 2) == "- -"


def test_streams_say_what_whole_answers_say():
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    call = {"id": "x", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": "ab", "reasoning_content": "c", "tool_calls": [call]}
    whole = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": usage}
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "c"}, {"content": "a"}, {"content": "b"},
              {"tool_calls": [{"index": 0, "id": "y", "function": {"name": "f", "arguments": ""}}]},
              {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    assert streamed_answer(CHAT, events + end) == whole_answer(CHAT, whole)
    for broken in (events, events + end[:1], end[1:], [*events, {"error": {"message": "no"}}]):
        with pytest.raises(ValueError, match="ends in the middle|has an error"):
            streamed_answer(CHAT, broken)


def test_streams_of_messages():
    body = {"content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "ab"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}],
            "stop_reason": "tool_use", "stop_sequence": None, "usage": {"output_tokens": 7}}
    starts = [{"type": "thinking", "thinking": ""}, {"type": "text", "text": ""}, {"type": "tool_use", "id": "2", "name": "f", "input": {}}]
    deltas = [[{"thinking": "h"}, {"thinking": "m"}, {"signature": "t"}], [{"text": "ab"}],
              [{"partial_json": '{"a"'}, {"partial_json": ": 1}"}]]
    events = [{"type": "message_start"}]
    for i, (start, parts) in enumerate(zip(starts, deltas)):
        events += [{"type": "content_block_start", "index": i, "content_block": start},
                   *({"type": "content_block_delta", "index": i, "delta": part} for part in parts)]
    events += [{"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"output_tokens": 7}},
               {"type": "message_stop"}]
    assert streamed_answer(MESSAGES, events) == whole_answer(MESSAGES, body)
    with pytest.raises(ValueError, match="ends in the middle"):
        streamed_answer(MESSAGES, events[:-1])


def test_the_command(small_model):
    done = CliRunner().invoke(main, [str(small_model(**TINY)), "--requests", "20", "--catalogue", "5", "--workers", "3",
                                     "--device", "reference", "-t", "1"])
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "all as expected", done.output
    assert done.stdout.startswith("20 requests in ") and "memory in MiB" in done.stdout
