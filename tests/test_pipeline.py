"""Models in stages, in threads of this process: the results of one process, the ring, many sessions, and what interrupts them."""
import copy
import gc
import os
import queue
import signal
import threading
import time

import numpy as np
import pytest
from helpers import nmse, random_ids
from stage_processes import OPTIONS, Launcher, session

import pydsa
from pydsa.engine.batch import Batch
from pydsa.engine.engine import Engine
from pydsa.engine.requests import Failed, Finished, Request
from pydsa.errors import ContextFullError, OutOfMemoryError, PydsaError, StageError
from pydsa.sampling import Picked, Sampler, Sampling
from pydsa.stages.journal import Journal
from pydsa.stages.pipeline import Pipeline
from pydsa.stages.stage import Stage
from pydsa.stages.wire import Part, Step, encode

DIVISIONS = [[(0, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]]
PROMPT = random_ids(30)


@pytest.fixture(scope="module")
def path(small_model):
    return small_model(n_layer=3)


@pytest.fixture(scope="module")
def whole(path):
    return pydsa.load(path, **OPTIONS)


@pytest.fixture
def piped(path):
    """piped(stages, ...) -> a Pipeline; it is ended with the test."""
    made = []

    def make(stages=DIVISIONS[2], wire="f32", end=None, head=0):
        launcher = Launcher(path, stages, wire, head=head)
        setup = launcher.setup
        if end is not None:
            setup.tokenizer.eog_ids = frozenset([end])
        made.append(Pipeline(launcher, setup, wire))
        return made[-1]
    yield make
    for pipeline in made:
        pipeline.close()


class Slow(Stage):
    """A stage whose steps wait.

    error: what those of the last one raise. most: stages that were at work at the same time.
    """
    error, seconds, busy, most = None, 0.0, set(), 0
    gate = threading.Event()

    def run(self, *args):
        """Run a step."""
        if self.error and self.last:
            raise self.error
        self.busy.add(self)
        Slow.most = max(self.most, len(self.busy))
        self.gate.wait(5)
        time.sleep(self.seconds)
        self.busy.discard(self)
        return super().run(*args)


@pytest.fixture
def slow(monkeypatch):
    """Stages whose steps wait for slow.gate."""
    monkeypatch.setattr("stage_processes.Stage", Slow)
    monkeypatch.setattr(Slow, "gate", threading.Event())
    monkeypatch.setattr(Slow, "seconds", 0.0)
    monkeypatch.setattr(Slow, "most", 0)
    Slow.gate.set()
    return Slow


@pytest.mark.parametrize("stages, head", [*((stages, 0) for stages in DIVISIONS), (DIVISIONS[2], 2)])
def test_logits_are_those_of_one_process(piped, whole, stages, head):
    pipeline = piped(stages, head=head)
    assert pipeline.depth == len(stages) + 1
    mine, theirs = session(pipeline), whole.session()
    np.testing.assert_array_equal(mine.logits(PROMPT), theirs.logits(PROMPT))
    np.testing.assert_array_equal(mine.decode(7), theirs.decode(7))
    mine.truncate(11), theirs.truncate(11)
    np.testing.assert_array_equal(mine.prefill([5, 6, 7]), theirs.prefill([5, 6, 7]))
    for mine_rows, their_rows in zip(mine.cut(0, 14), theirs.cut(0, 14)):
        np.testing.assert_array_equal(mine_rows, their_rows)


SAMPLINGS = {"greedy": Sampling(temperature=0), "drawn": Sampling(temperature=1.5, top_k=0, seed=3), "biased": Sampling(
    temperature=1.0, seed=1, logit_bias={4: 30.0, 5: False}), "penalized": Sampling(temperature=1.0, seed=1, repeat_penalty=3.0)}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("pause, head", [(0, 0), (0.005, 0), (0, 2)])
def test_answers_are_those_of_one_process(piped, whole, name, pause, head):
    """The caller asks before or after the step that runs ahead has ended."""
    mine, theirs = session(piped(head=head)), whole.session()
    expected = list(theirs.generate(PROMPT, 12, SAMPLINGS[name]))
    met = []
    for token in mine.generate(PROMPT, 12, SAMPLINGS[name]):
        met.append(token)
        time.sleep(pause)
    assert met == expected and mine.tokens == theirs.tokens
    np.testing.assert_array_equal(mine.prefill([3]), theirs.prefill([3]))


def test_a_stage_starts_the_next_step(piped, slow, monkeypatch):
    """The driver sends few steps of an answer by itself. At most one runs ahead of what was asked for."""
    pipeline, made, enter = piped(), [], Pipeline._enter
    monkeypatch.setattr(Pipeline, "_enter", lambda self, pending: (made.append(pending), enter(self, pending)))
    mine = session(pipeline)
    answer = mine.generate(PROMPT[:5], 20, Sampling(temperature=0))
    slow.seconds = 0.005        # so that there is time to ask
    for _ in range(3):
        next(answer)
    time.sleep(0.1)
    assert mine.n_past == 7 and len(made) <= 4      # the prompt, two tokens that were asked for, and one more
    assert len(list(answer)) == 17 and len(made) == 20
    assert [pending.ring for pending in made[:2]] == [False, False] and sum(pending.ring for pending in made) >= 9
    assert not made[-1].follow and not pipeline.under_way       # nothing was begun after the last token


def test_the_next_steps_of_many_sessions_are_started(piped, slow, monkeypatch):
    """Each has its own permission."""
    pipeline, made, enter = piped(), [], Pipeline._enter
    monkeypatch.setattr(Pipeline, "_enter", lambda self, pending: (made.append(pending.ring), enter(self, pending)))
    answers = [session(pipeline).generate(PROMPT[:3], 12, Sampling(temperature=0)) for _ in range(3)]
    for answer in answers:
        next(answer), next(answer)
    slow.seconds = 0.003
    threads = [threading.Thread(target=list, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 * 12 and sum(made) >= 20


def test_all_stages_are_busy(piped, slow):
    """With chunks of one prompt, and with tokens of several conversations.

    One conversation's tokens come one after the other.
    """
    pipeline = piped()
    slow.seconds = 0.02
    session(pipeline).prefill(random_ids(60))
    assert slow.most == 3
    mine = [session(pipeline) for _ in range(6)]
    slow.most = 0
    next(mine[0].generate([1], 2, Sampling(temperature=0)))
    assert slow.most == 1
    for step in [one.begin([1]) for one in mine]:
        step.finish()
    assert slow.most == 3


def test_a_token_that_ends_the_answer_starts_nothing(piped, whole):
    tokens = list(whole.session().generate(PROMPT[:5], 6, Sampling(temperature=0)))
    end = tokens[3]
    assert end not in tokens[:3]
    pipeline = piped(end=end)
    mine = session(pipeline)
    assert list(mine.generate(PROMPT[:5], 6, Sampling(temperature=0))) == tokens[:3]
    assert pipeline.steps == 4 and not pipeline.under_way


def test_what_ran_ahead_in_vain_does_no_harm(piped, whole):
    """Another token, another sampling, a truncation, a save: each in place of the token that was started."""
    mine, theirs = session(piped()), whole.session()

    def both(act):
        return act(mine), act(theirs)

    def some(n, **sampling):
        def act(one):
            answer = one.sample(one.prefill([9, 8]), None, Sampling(temperature=1.0, seed=5, **sampling))
            return [next(answer) for _ in range(n)]
        return act
    for act in (lambda one: one.prefill(PROMPT[:12]), some(3), lambda one: one.decode(33), some(4), lambda one: one.truncate(9), some(2),
                lambda one: one.cut(0, one.n_past), some(3), lambda one: one.paste([1, 2], [rows[:2] for rows in one.cut(0, 2)]),
                lambda one: one.decode(5), some(2, top_k=3), lambda one: one.logits([1, 2, 3])):
        a, b = both(act)
        for x, y in zip(a, b) if a is not None else ():
            np.testing.assert_array_equal(x, y)
    assert mine.tokens == theirs.tokens


def test_a_started_step_that_comes_late(piped, whole, monkeypatch):
    """The first stage gets it after the driver has the token: another step in its place waits for it."""
    pipeline, theirs = piped(), whole.session()
    mine = session(pipeline)
    late, send = pipeline.launcher.workers[2]._onward, pipeline.launcher.workers[2]._onward.send
    monkeypatch.setattr(late, "send", lambda *frame: threading.Timer(0.1, send, frame).start())
    for one in (mine, theirs):
        answer = one.generate(PROMPT[:5], 9, Sampling(temperature=0))
        next(answer), next(answer)
        one.prefill([7, 8, 9])
    for mine_rows, their_rows in zip(mine.cut(0, mine.n_past), theirs.cut(0, theirs.n_past)):
        np.testing.assert_array_equal(mine_rows, their_rows)


def test_rows_are_not_restored_under_a_step(piped, whole, slow):
    """A step under way would overwrite them, in stages it has not reached."""
    pipeline, theirs = piped(), whole.session()
    mine = session(pipeline)
    mine.prefill(PROMPT[:4]), theirs.prefill(PROMPT[:6])
    rows = theirs.cut(4, 6)
    slow.gate.clear()
    mine._bind(4, 2, 0).begin([9, 9], 4, np.empty((0, 300), np.float32))
    threading.Timer(0.1, slow.gate.set).start()
    mine.paste(PROMPT[4:6], rows)
    np.testing.assert_array_equal(mine.decode(3), theirs.decode(3))


def test_frames_of_another_time_are_ignored(piped, whole):
    """Such as those of before a restart, which come late."""
    pipeline = piped()
    mine = session(pipeline)
    mine.prefill(PROMPT[:6])
    step = Step(pipeline.links.epoch - 1, 10**6, mine._bind(0, 6, 0).variant, [Part(mine.caches.number, 0, 6)], [], np.zeros(6, np.int32))
    pipeline.links._steps.send(*encode(step))
    np.testing.assert_array_equal(mine.prefill(PROMPT[6:9]), whole.session().prefill(PROMPT[:9]))


def test_bfloat16_rows_are_near(piped, whole):
    mine, theirs = session(piped(wire="bf16")).logits(PROMPT), whole.session().logits(PROMPT)
    errors = nmse(mine, theirs)
    assert 1e-8 < np.median(errors) < 1e-3      # of some tokens other keys or experts are chosen


def test_batches_of_sessions(piped, whole):
    """Prompts of different lengths, then tokens. The last stage samples them, but for one."""
    pipeline = piped()
    prompts = [PROMPT[:3], PROMPT[3:4], PROMPT[4:8]]
    mine, theirs = [session(pipeline) for _ in prompts], [whole.session() for _ in prompts]
    batch, other = Batch(pipeline, pipeline.setup), Batch(whole.runner, whole.setup)
    for met, expected in zip(batch.run(mine, prompts), other.run(theirs, prompts)):
        np.testing.assert_array_equal(met, expected)
    samplers, others = [[Sampler(Sampling(temperature=1.0, seed=i, presence_penalty=float(i == 1))) for i in range(3)] for _ in "ab"]
    ids = [[1], [2], [3]]
    for _ in range(4):
        met = batch.begin(mine, ids, samplers).finish()
        assert [isinstance(one, Picked) for one in met] == [True, False, True]
        met = [one.pick(*args) for one, *args in zip(mine, met, samplers)]
        assert met == [one.pick(*args) for one, *args in zip(theirs, other.run(theirs, ids), others)]
        ids = [[token] for token in met]


def engine_answers(model, requests):
    """What an Engine with four slots answers to requests at once."""
    engine, heard = Engine(model, 4), queue.Queue()
    try:
        for i, request in enumerate(requests):
            engine.submit(Request(listener=lambda event, i=i: heard.put((i, event)) if isinstance(event, (Finished, Failed)) else None,
                                  **request))
        return {i: (event.reply.text, event.reply.n_generated) for i, event in (heard.get(timeout=60) for _ in requests)}
    finally:
        engine.close()


def test_the_head_does_not_wait_for_a_whole_prompt(piped, slow, monkeypatch):
    """Logits come before the last chunk of another session has begun."""
    order, pipeline, run, head = [], piped(DIVISIONS[1]), Slow.run, Slow.head
    monkeypatch.setattr(Slow, "run", lambda self, *args: (order.append(len(args[2])) if self.first else None, run(self, *args))[1])
    monkeypatch.setattr(Slow, "head", lambda self, *args: (order.append("head"), head(self, *args))[1])
    mine, other = session(pipeline), session(pipeline)
    slow.seconds = 0.08
    pending = mine._bind(0, 3, 1).begin(PROMPT[:3], 0, np.empty((1, 300), np.float32))
    other.prefill(PROMPT[:24])
    pending.finish()
    assert order.index("head") < 4 and order.count(8) == 3 and order.count("head") == 2


def test_results_are_settled_in_the_order_of_the_steps(path, whole, monkeypatch):
    """Those of chunks come later than that of the prompt's end here."""
    added, finished = [], Pipeline._finished
    monkeypatch.setattr(Journal, "add", lambda self, ran: added.append(ran.parts[0][1]))
    monkeypatch.setattr(Pipeline, "_finished", lambda self, result: finished(self, result) if result.picked else threading.Timer(
        0.1, finished, (self, result)).start())
    launcher = Launcher(path, DIVISIONS[1])
    pipeline = Pipeline(launcher, launcher.setup, resume=True)
    try:
        np.testing.assert_array_equal(session(pipeline).prefill(PROMPT[:20]), whole.session().prefill(PROMPT[:20]))
    finally:
        pipeline.close()
    assert added == [0, 8, 16]


def test_the_next_steps_of_groups_are_started(piped, whole, monkeypatch):
    """Many steps of an engine's answers are started by a stage.

    Most, if the processes are not kept waiting. They have many lengths; a text ends one, one has a penalty.
    """
    pipeline, made, enter = piped(DIVISIONS[1]), [], Pipeline._enter
    monkeypatch.setattr(Pipeline, "_enter", lambda self, pending: (made.append((pending.ring, len(pending.parts))), enter(self, pending)))
    staged = copy.copy(whole)
    staged.runner = pipeline
    requests = [dict(ids=PROMPT[i:i + n], max_tokens=9 + 5 * (i % 3), sampling=Sampling(
        seed=i, temperature=i % 2, repeat_penalty=1.5 if i == 4 else 1.0)) for i, n in enumerate([20, 3, 12, 5, 9, 13, 2])]
    text = whole.complete(PROMPT[2:14], 19, temperature=0).text
    requests[2]["stop"] = (text[len(text) // 2:][:2],)
    expected = engine_answers(whole, requests)
    assert expected[2][1] < 19 and engine_answers(staged, requests) == expected
    steps = [(ring, n) for ring, n in made if n > 1]
    assert sum(ring for ring, _ in steps) > len(steps) / 3 and not pipeline.under_way


def test_a_sampler_that_drew_in_vain(piped, whole):
    """Steps that nobody finishes, or that are dropped: the next draws are those that come next."""
    pipeline = piped()
    mine, theirs = session(pipeline), whole.session()
    sampler, other = [Sampler(Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=3)) for _ in "ab"]
    mine.prefill(PROMPT[:4]), theirs.prefill(PROMPT[:4])
    met, expected = [], []
    for token in range(4):
        bound = mine._bind(mine.n_past, 1, 1)
        bound.begin([9], mine.n_past, None, samplers=[sampler])
        bound.begin([8], mine.n_past, None, samplers=[sampler], follow=bound.variant).drop()
        met.append(mine.begin([token], sampler).finish().token)
        expected.append(other.pick(theirs.prefill([token])))
    assert met == expected and len(set(met)) > 1


def test_many_sessions_at_once(piped, whole):
    """Threads with conversations, more than the pipeline takes at once."""
    pipeline, met = piped(), {}
    prompts = [random_ids(5 + i, i) for i in range(12)]

    def answer(i):
        met[i] = list(session(pipeline).generate(prompts[i], 6, Sampling(temperature=1.0, seed=i)))
    threads = [threading.Thread(target=answer, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == {i: list(whole.session().generate(prompt, 6, Sampling(temperature=1.0, seed=i))) for i, prompt in enumerate(prompts)}


ACTS = {"chunks of a prompt": lambda one: one.prefill(PROMPT[3:28]), "a token": lambda one: one.decode(5),
        "an answer": lambda one: list(one.sample(np.arange(300.0), 9, Sampling(temperature=1.0, seed=1))),
        "logits": lambda one: one.logits(PROMPT[3:20])}


@pytest.mark.parametrize("name", ACTS)
def test_ctrl_c_leaves_the_session_as_it_was(piped, whole, slow, name):
    """What is under way ends, and does no harm to what comes next."""
    pipeline, theirs = piped(), whole.session()
    mine = session(pipeline)
    mine.prefill(PROMPT[:3]), theirs.prefill(PROMPT[:3])
    slow.gate.clear()
    timers = [threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)), threading.Timer(0.2, slow.gate.set)]
    for timer in timers:
        timer.start()
    theirs_before = signal.signal(signal.SIGINT, signal.default_int_handler)      # which a shell lets programs in its background ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            ACTS[name](mine)
    finally:
        signal.signal(signal.SIGINT, theirs_before)
    timers[1].join()
    assert mine.tokens == PROMPT[:3] and not mine._under_way
    met, expected = [list(one.generate([6, 7], 6, Sampling(temperature=1.0, seed=2))) for one in (mine, theirs)]
    assert met == expected
    for mine_rows, their_rows in zip(mine.cut(0, mine.n_past), theirs.cut(0, theirs.n_past)):
        np.testing.assert_array_equal(mine_rows, their_rows)
    assert not pipeline.under_way


def test_errors_of_a_stage_keep_their_class(piped, slow, monkeypatch):
    pipeline = piped()
    mine = session(pipeline)
    mine.prefill(PROMPT[:4])
    for error, kind, words in ((pydsa.DamagedWeightsError("x is not finite"), pydsa.DamagedWeightsError, "x is not finite"),
                               (MemoryError(), OutOfMemoryError, "a stage has no more memory"),
                               (ZeroDivisionError("div"), StageError, r"met an internal error \(ZeroDivisionError: div\)")):
        monkeypatch.setattr(slow, "error", error)
        with pytest.raises(kind, match=rf"^Stage 3 of 3 \(layers 2-2, node 127.0.0.1\).*{words}"):
            mine.prefill(PROMPT[4:20])
        assert mine.n_past == 4
        monkeypatch.setattr(slow, "error", None)
    assert mine.prefill(PROMPT[4:20]).shape == (300,) and not pipeline.under_way


def test_sessions_are_released_on_all_stages(piped):
    pipeline = piped()
    mine = [session(pipeline) for _ in range(3)]
    for one in mine:
        next(one.generate(PROMPT[:3], 5, Sampling(temperature=0)))
    stages = [worker._stage for worker in pipeline.launcher.workers.values()]
    assert {len(stage.sessions) for stage in stages} == {3}
    del mine[:2], one
    gc.collect()
    end = time.monotonic() + 5
    while {len(stage.sessions) for stage in stages} != {1} and time.monotonic() < end:
        time.sleep(0.02)
    assert {len(stage.sessions) for stage in stages} == {1} and len(pipeline.conversations) == 1


def test_what_does_not_fit_is_refused(piped, monkeypatch):
    pipeline = piped()
    mine = session(pipeline)
    with pytest.raises(ContextFullError):
        mine.prefill(random_ids(65))
    monkeypatch.setattr("pydsa.machine.limits.available", lambda: (1000, "memory are free"))
    with pytest.raises(OutOfMemoryError, match="^Stage 1 of 3 .*the caches of a new session would take"):
        session(pipeline)
    with pytest.raises(OutOfMemoryError, match="^Stage 1 of 3 .*The caches of 5 sessions would take"):
        pipeline.check_room(pipeline.setup, 5, "The caches of 5 sessions")


def test_hooks_cannot_look_into_stages(piped):
    pipeline = piped()
    caches = pipeline.make_caches(pipeline.setup, 64)
    with pytest.raises(PydsaError, match="hooks cannot look into it: load the model without stages"):
        pipeline.bind("dense", caches, 1, 1).begin([1], 0, np.empty((1, 300), np.float32), hooks=(object(),))


def test_after_its_end_all_is_refused(piped):
    pipeline = piped()
    mine = session(pipeline)
    mine.prefill(PROMPT)
    pipeline.close()
    for act in (lambda: mine.decode(1), lambda: mine.cut(0, 3), lambda: session(pipeline)):
        with pytest.raises(StageError, match="The model's stages were ended"):
            act()
    assert pipeline.launcher.closed
