"""The engine: answers are those of each request alone, prefixes are reused, nothing is lost."""
import queue
import threading

import numpy as np
import pytest
from helpers import random_ids

from pydsa import ContextFullError, PydsaError, Sampling
from pydsa.engine import engine as module
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Cancelled, Failed, Finished, InternalError, Progress, QueueFullError, Request, Started, Written

IDS = random_ids(400, n_vocab=290)
GREEDY = Sampling(temperature=0)
WAIT = 60       # seconds after which a test gives up


class Heard:
    """A listener that waits for the last event."""

    def __init__(self):
        self.events, self._queue = [], queue.Queue()

    def __call__(self, event):
        self.events.append(event)
        self._queue.put(event)

    def until(self, kind):
        """The first event of a kind, or the last event."""
        while True:
            event = self._queue.get(timeout=WAIT)
            if isinstance(event, (kind, Finished, Failed)):
                return event

    def last(self):
        return self.until(Finished)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def model(small_model, load):
    return load(small_model(), n_ctx=128, n_ubatch=16)


@pytest.fixture
def start(model):
    """start(n_parallel=..., ...) -> an Engine, closed at the end."""
    engines = []

    def make(**options):
        engines.append(Engine(model, **options))
        return engines[-1]
    yield make
    for engine in engines:
        engine.close()


def ask(engine, ids, n=8, sampling=GREEDY, **options):
    """Submit a request -> its Heard, with its ticket."""
    heard = Heard()
    heard.ticket = engine.submit(Request(ids, heard, sampling, max_tokens=n, **options))
    return heard


def text_of(heard):
    event = heard.last()
    assert isinstance(event, Finished), event
    assert "".join(piece for written in heard.of(Written) for piece in written.pieces) == event.reply.text
    return event.reply.text


def expected(model, ids, n=8, sampling=GREEDY):
    """What a session alone answers."""
    reader = module.Ticket(Request(ids, None), ids, model.tokenizer).reader
    for token in model.session().generate(ids, n, sampling):
        reader.push(token)
    reader.end()
    return reader.reply.text


def test_events_of_an_answer(start, model):
    heard = ask(start(), IDS[:40], 5)
    assert text_of(heard) == expected(model, IDS[:40], 5)
    started, *others = heard.events
    assert started == Started(40, 0, 0, "no cached conversation begins like it")
    assert heard.of(Progress)[-1] == Progress(40, 40) and others.index(Progress(40, 40)) == len(heard.of(Progress)) - 1
    reply, timings = heard.events[-1]
    assert (reply.n_prompt, reply.n_generated, reply.finish_reason) == (40, 5, "length")
    assert timings[:3] == (40, 0, 5) and min(timings) >= 0


def test_answers_at_the_same_time_are_those_of_each_alone(start, model):
    engine, samplings = start(n_parallel=3), [GREEDY, Sampling(seed=1), Sampling(seed=2, temperature=1.5, repeat_penalty=1.3)]
    requests = [(IDS[i * 7:i * 7 + 5 + i], samplings[i % 3], 3 + 5 * (i % 4)) for i in range(9)]
    heard = [ask(engine, ids, n, sampling) for ids, sampling, n in requests]
    assert [text_of(h) for h in heard] == [expected(model, ids, n, sampling) for ids, sampling, n in requests]
    assert {event.slot for h in heard for event in h.of(Started)} == {0, 1, 2}
    stats = engine.stats
    assert stats.n_finished == stats.n_requests == 9 and stats.n_generated == sum(n for _, _, n in requests)
    assert stats.n_steps < stats.n_generated        # some steps were of several answers
    assert engine.erase_slot(0) and stats.n_busy == stats.n_waiting == 0        # counted before the call


def test_a_conversation_goes_on_in_its_slot(start, model):
    engine = start(cache_bytes=0)
    first = ask(engine, IDS[:20])
    text_of(first)
    ids = [*IDS[:20], *engine._slots[0].session.tokens[20:], 5, 6]
    second = ask(engine, ids)
    assert text_of(second) == expected(model, ids)
    assert second.of(Started)[0].n_reused == len(ids) - 2


@pytest.mark.parametrize("n_parallel", [1, 2])
def test_a_conversation_comes_back_after_others(start, model, n_parallel):
    """... also where its slot was given to another one; one that was rewritten is reused as far as it agrees."""
    engine = start(n_parallel=n_parallel)
    for ids in (IDS[:50], IDS[100:150], IDS[200:250]):
        text_of(ask(engine, ids))
    again = ask(engine, IDS[:60])
    assert text_of(again) == expected(model, IDS[:60])
    assert again.of(Started)[0].n_reused >= 50
    rewritten = ask(engine, [*IDS[100:130], *IDS[50:70]])
    text_of(rewritten)
    started, = rewritten.of(Started)
    assert started.n_reused == 30 and "from token 30 on" in started.why or "after token 30" in started.why


def test_the_log_says_why_no_more_is_reused(start):
    engine = start(cache_bytes=0)
    text_of(ask(engine, IDS[:30]))
    cases = [(IDS[:30], {}, 29, ""), (IDS[:29] + [7], {}, 29, ""), (IDS[:30], dict(reuse=False), 0, "the request asks for none"),
             ([*IDS[:10], 3, 4], {}, 10, "it differs from the conversation of 37 tokens in the slot from token 10 on"),
             (IDS[60:80], {}, 0, "it differs from the conversation of 19 tokens in the slot from token 0 on")]
    for ids, options, n_reused, why in cases:
        heard = ask(engine, ids, **options)
        text_of(heard)
        assert heard.of(Started)[0][1::2] == (n_reused, why)


def test_a_common_beginning_is_run_once(start, model):
    """... also by requests that come at the same time."""
    engine, system = start(n_parallel=3), IDS[:80]
    requests = [[*system, *IDS[90 + i:95 + i]] for i in range(3)]
    heard = [ask(engine, ids) for ids in requests]
    assert [text_of(h) for h in heard] == [expected(model, ids) for ids in requests]
    assert engine.stats.n_prompt <= 80 + 3 * 16     # chunks of n_ubatch, which is 16
    assert engine.stats.n_prompt + engine.stats.n_reused == 3 * 85


def test_owners_do_not_share(start, model):
    engine = start(n_parallel=1)
    text_of(ask(engine, IDS[:30], owner="a"))
    other = ask(engine, IDS[:30], owner="b")
    assert text_of(other) == expected(model, IDS[:30]) and other.of(Started)[0].n_reused == 0
    mine = ask(engine, IDS[:30], owner="a")
    text_of(mine)
    assert mine.of(Started)[0].n_reused == 29


def test_a_long_prompt_does_not_hold_up_the_others(start, model, monkeypatch):
    """Prompts take turns, chunk by chunk."""
    monkeypatch.setattr(module, "CHUNK", 4)
    engine, order = start(n_parallel=3, cache_bytes=0), []

    def listen(name, ids, n):
        heard = Heard()

        def hear(event):
            order.append((name, type(event)))
            heard(event)
        engine.submit(Request(ids, hear, GREEDY, max_tokens=n))
        return heard
    answer = listen("answer", IDS[:5], 100)
    answer.until(Written)
    heard = [answer, listen("long", IDS[10:70], 1), listen("other", IDS[80:130], 1)]
    assert all(text_of(h) is not None for h in heard)
    kinds = [(name, kind) for name, kind in order if kind in (Progress, Written) and name == "answer" or kind is Progress]
    chunks = [name for name, kind in kinds if kind is Progress and name != "answer"]
    assert len(chunks) == 15 + 13 and all(a != b for a, b in zip(chunks[2:20], chunks[3:20]))      # prompts take turns
    first, last = (f(i for i, (name, _) in enumerate(kinds) if name == "long") for f in (min, max))
    assert all(a[0] == "answer" or b[0] == "answer" for a, b in zip(kinds[first:last], kinds[first + 1:last]))


def test_a_cancelled_request_frees_its_slot(start, model):
    engine = start(n_parallel=1)
    first, waiting, last = ask(engine, IDS[:5], None), ask(engine, IDS[5:9]), ask(engine, IDS[9:20])
    assert isinstance(first.until(Written), Written)
    waiting.ticket.cancel()
    first.ticket.cancel()
    assert all(isinstance(h.last(), Failed) and isinstance(h.events[-1].error, Cancelled) for h in (first, waiting))
    assert text_of(last) == expected(model, IDS[9:20])
    assert engine.stats.n_cancelled == 2 and engine.stats.n_finished == 1


def test_the_queue_has_an_end(start):
    engine = start(n_parallel=1, n_queue=2)
    running = [ask(engine, IDS[:5], None) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests run or wait"):
        ask(engine, IDS[:5])
    for heard in running:
        heard.ticket.cancel()
        heard.last()
    text_of(ask(engine, IDS[:5]))


def test_a_full_context_ends_the_answer(start, model):
    heard = ask(start(), IDS[:120], None)
    reply, _ = heard.last()
    assert reply.finish_reason in ("length", "stop") and reply.n_generated <= 9
    assert reply.finish_reason == "stop" or reply.n_generated == 9


@pytest.mark.parametrize("change, error, words", [
    (dict(ids=[]), PydsaError, "at least one integer"), (dict(ids=[300]), PydsaError, "0 to 299"),
    (dict(ids=[10**30]), PydsaError, "0 to 299"),
    (dict(ids=IDS[:128]), ContextFullError, "the prompt has 128"), (dict(max_tokens=-1), PydsaError, "max_tokens"),
    (dict(stop=[""]), PydsaError, "stop is"), (dict(slot=1), PydsaError, "expected 0 to 0"),
    (dict(sampling=Sampling(logit_bias={300: 1})), PydsaError, "logit_bias")])
def test_bad_requests_are_refused_at_once(start, change, error, words):
    engine = start()
    with pytest.raises(error, match=words):
        engine.submit(Request(**dict(ids=IDS[:5], listener=Heard()) | change))
    text_of(ask(engine, IDS[:5]))


def test_a_fault_ends_only_its_request(start, model, capfd):
    """A listener that fails, and an error of the program."""
    engine = start(n_parallel=2)

    def broken(event):
        raise RuntimeError("gone")
    engine.submit(Request(IDS[:9], broken, GREEDY, max_tokens=50))
    constraint = type("Broken", (), {"start": lambda self: 1 / 0})()
    failed = ask(engine, IDS[:9], constraint=constraint).last()
    assert isinstance(failed, Failed) and "internal error" in str(failed.error) and "ZeroDivisionError" in str(failed.error)
    assert text_of(ask(engine, IDS[:9])) == expected(model, IDS[:9])
    assert "gone" in capfd.readouterr().err
    engine.close()
    assert engine.stats.n_requests == engine.stats.n_finished + engine.stats.n_failed + engine.stats.n_cancelled == 3


@pytest.mark.parametrize("fault", [ValueError("broken"), PydsaError("refused")])
def test_a_fault_of_a_step_ends_its_requests(start, model, monkeypatch, fault):
    """... and no others, and not the engine."""
    engine, running = start(n_parallel=2), []

    def fail(sessions, *args):
        running.append(len(sessions))
        monkeypatch.undo()
        raise fault
    monkeypatch.setattr(engine._batch, "begin", fail)
    failed = ask(engine, IDS[:9]).last()
    assert running == [1] and isinstance(failed.error, PydsaError)
    assert isinstance(failed.error, InternalError) == isinstance(fault, ValueError) and str(fault) in str(failed.error)
    assert text_of(ask(engine, IDS[:9])) == expected(model, IDS[:9]) and engine.stats.n_failed == 1


def test_a_fault_at_the_end_of_an_answer_counts_once(start, model, monkeypatch):
    """Its client has heard of the end already."""
    engine = start()
    monkeypatch.setattr(engine._prefixes, "add", lambda owner, session: 1 / 0 if session.n_past > 12 else None)
    heard = ask(engine, IDS[:9])
    assert isinstance(heard.last(), Finished)
    engine.erase_slot(0)
    assert engine._n_open == 0 and engine.stats.n_finished == 1 and engine.stats.n_failed == 0 and heard.events[-1] == heard.of(Finished)[0]


def test_stop_texts_and_no_tokens(start, model):
    whole = expected(model, IDS[:20], 30)
    stop = whole[len(whole) // 2:len(whole) // 2 + 3]
    reply, _ = ask(start(), IDS[:20], 30, stop=[stop]).last()
    assert reply.text == whole[:whole.index(stop)] and reply.finish_reason == "stop"
    reply, timings = ask(start(), IDS[:20], 0).last()
    assert reply.text == "" and reply.finish_reason == "length" and timings.n_generated == 0


def test_slots_are_saved_restored_and_erased(start, tmp_path):
    engine, path = start(n_parallel=2), tmp_path / "talk"
    text_of(ask(engine, IDS[:30], slot=1, owner="a"))
    state = engine.slots()[1]
    assert (state.state, state.n_past, state.owner) == ("idle", 37, "a") and engine.slots()[0].n_past == 0
    for function in (engine.save_slot, lambda i, path, owner: engine.erase_slot(i, owner)):
        with pytest.raises(PydsaError, match="another user's"):
            function(1, path, "b")
    assert engine.save_slot(1, path, "a") == 37 and engine.erase_slot(1, "a") == 37 == engine.restore_slot(0, path, "a")
    heard = ask(engine, IDS[:40], slot=0, owner="a")
    text_of(heard)
    assert heard.of(Started)[0].n_reused >= 30
    for wrong in (2, -1, "x", None):
        with pytest.raises(PydsaError, match="expected 0 to 1"):
            engine.erase_slot(wrong)
    running = ask(engine, IDS[:5], None, slot=0)
    running.until(Written)
    with pytest.raises(PydsaError, match="busy"):
        engine.restore_slot(0, path)
    assert engine.slots()[0].state == "generation" and engine.stats.n_busy == 1


def test_closing_waits_for_what_runs(start, model):
    engine = start()
    heard, waiting = ask(engine, IDS[:5], 60), ask(engine, IDS[:6], 5)
    threading.Thread(target=engine.close, args=(WAIT,)).start()
    assert text_of(heard) == expected(model, IDS[:5], 60) and text_of(waiting) == expected(model, IDS[:6], 5)
    with pytest.raises(QueueFullError, match="closing"):
        ask(engine, IDS[:5])
    engine._thread.join(WAIT)
    with pytest.raises(Cancelled):
        engine.erase_slot(0)


def test_closing_at_once_ends_all(start):
    engine = start()
    heard, waiting = ask(engine, IDS[:5], None), ask(engine, IDS[:6])
    heard.until(Written)
    engine.close()
    assert all(isinstance(h.last(), Failed) for h in (heard, waiting))


def test_conversations_move_to_files_and_come_back(start, model, tmp_path):
    row = sum(model.setup.cache_row_bytes.values())
    engine = start(cache_bytes=60 * row, cache_folder=tmp_path)
    for i in range(4):
        text_of(ask(engine, IDS[60 * i:60 * i + 40]))
    assert list(tmp_path.iterdir()) and engine._prefixes.n_bytes <= 60 * row
    again = ask(engine, IDS[:45])
    assert text_of(again) == expected(model, IDS[:45]) and again.of(Started)[0].n_reused >= 40
    engine.close()
    assert not list(tmp_path.iterdir())


def test_many_requests_at_random(start, model):
    """Every answer is that of its request alone, whoever leaves meanwhile."""
    rng, engine = np.random.default_rng(0), start(n_parallel=3, n_queue=1000)
    left, stayed = [], []
    for i in range(60):
        first, n = int(rng.integers(0, 3)) * 50, int(rng.integers(1, 40))
        ids, sampling = IDS[first:first + n] + IDS[i:i + 1], Sampling(seed=i)
        heard = ask(engine, ids, int(rng.integers(1, 12)), sampling)
        if rng.random() < 0.3:
            left.append(heard)
            threading.Timer(rng.random() * 0.3, heard.ticket.cancel).start()
        else:
            stayed.append((heard, ids, sampling))
    for heard, ids, sampling in stayed:
        assert text_of(heard) == expected(model, ids, heard.ticket.request.max_tokens, sampling)
    assert all(isinstance(heard.last(), (Finished, Failed)) for heard in left)
    assert all(slot.state == "idle" for slot in engine.slots()) and engine._n_open == 0


class Only:
    """A constraint to some tokens, one after the other."""

    def __init__(self, tokens):
        self.tokens, self.n_vocab = tokens, 300

    def start(self):
        return Only(list(self.tokens))

    @property
    def finished(self):
        return not self.tokens

    def allowed(self):
        mask = np.zeros(self.n_vocab, bool)
        mask[self.tokens[0]] = True
        return mask

    def advance(self, token):
        assert token == self.tokens.pop(0)


def test_a_constraint_holds_and_ends_the_answer(start, model):
    engine, only = start(n_parallel=2), Only([7, 250, 8, 9])
    heard = [ask(engine, IDS[:20], 50, Sampling(seed=1), constraint=only), ask(engine, IDS[:20], 50),
             ask(engine, IDS[:9], 3, constraint=only)]
    replies = [h.last().reply for h in heard]
    assert [reply.n_generated for reply in replies[::2]] == [4, 3] and len(only.tokens) == 4
    assert [reply.finish_reason for reply in replies[::2]] == ["stop", "length"]
    assert replies[1].text == expected(model, IDS[:20], 50)


@pytest.mark.parametrize("n", [0, 3])
def test_log_probabilities_are_those_of_the_logits(start, model, n):
    heard = ask(start(), IDS[:20], 4, n_logprobs=n)
    heard.last()
    tokens, session, ids = [written.token for written in heard.of(Written) if written.token], model.session(), IDS[:20]
    assert len(tokens) == 4
    for token in tokens:
        logits = session.prefill(ids).astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert token.id == logits.argmax() and token.logprob == pytest.approx(logprobs.max())
        assert [i for i, _ in token.top] == np.argsort(-logits, kind="stable")[:n].tolist()
        assert [p for _, p in token.top] == pytest.approx(np.sort(logprobs)[::-1][:n])
        ids = [token.id]
