"""Steps of several sessions: each token's logits are those that it has alone."""
import numpy as np
import pytest
from helpers import random_ids

from pydsa import ContextFullError, DamagedWeightsError
from pydsa.engine.batch import KEPT, Batch
from pydsa.errors import PydsaError

IDS = random_ids(128)
LENGTHS = 3, 30, 11       # top_k is 12: below it, beyond it, and passing it


def sessions_of(model, lengths):
    """Sessions that have read other parts of IDS."""
    sessions = [model.session() for _ in lengths]
    for i, (session, n) in enumerate(zip(sessions, lengths)):
        session.prefill(IDS[i:i + n])
    return sessions


def one_each(tokens):
    return [[token] for token in tokens]


def alone(model, lengths, tokens):
    """The logits after each token of each session, [step][session]."""
    return list(zip(*([session.decode(t) for t in mine] for session, mine in zip(sessions_of(model, lengths), tokens))))


@pytest.mark.parametrize("spec, options", [
    ({}, {}), ({}, dict(attention="masked")), ({}, dict(attention="dense")), ({}, dict(attention="sparse", kv_type="i16")),
    (dict(arch="glm-dsa", n_layer=2, indexer_types="FS"), dict(kv_type="i8")), (dict(arch="deepseek2"), dict(kv_type="f16")),
    (dict(type="Q4_K", n_embd=256, n_ff=256, n_ff_exp=256), dict(kv_type="i16"))])
def test_logits_are_those_of_each_session_alone(small_model, load, spec, options):
    model = load(small_model(**spec), **options)
    tokens = [IDS[40 + 5 * i:45 + 5 * i] for i in range(len(LENGTHS))]
    expected, sessions, batch = alone(model, LENGTHS, tokens), sessions_of(model, LENGTHS), Batch(model.runner, model.setup)
    for step, column in enumerate(zip(*tokens)):
        for got, logits in zip(batch.run(sessions, one_each(column)), expected[step]):
            assert np.array_equal(got, logits)
    assert [session.n_past for session in sessions] == [n + 5 for n in LENGTHS]
    assert sessions[1].tokens == IDS[1:31] + tokens[1]


def test_keys_that_are_not_divided(small_model, load):
    """Four tokens are a task each, with the bits of keys that are divided."""
    model = load(small_model(), attention="dense", threads=1, threads_batch=2)
    lengths, tokens = [70, 100, 66, 120], [[7], [8], [9], [10]]
    expected, sessions, batch = alone(model, lengths, tokens), sessions_of(model, lengths), Batch(model.runner, model.setup)
    assert all(np.array_equal(got, logits) for got, logits in zip(batch.run(sessions, tokens), expected[0]))


def test_many_sessions(small_model, load):
    """More than are multiplied one by one, and in any order."""
    model = load(small_model())
    lengths = [5 + 3 * i for i in range(9)]
    tokens = [IDS[60 + 2 * i:62 + 2 * i] for i in range(9)]
    expected, sessions, batch = alone(model, lengths, tokens), sessions_of(model, lengths), Batch(model.runner, model.setup)
    order = [4, 2, 8, 0, 1, 7, 6, 3, 5]
    for step, column in enumerate(zip(*tokens)):
        for i, got in zip(order, batch.run([sessions[i] for i in order], one_each(column[i] for i in order))):
            np.testing.assert_allclose(got, expected[step][i], rtol=1e-3, atol=1e-4)


def test_only_a_full_session_gets_an_error(small_model, load):
    model = load(small_model(), n_ctx=32)
    sessions, batch = sessions_of(model, [32, 5, 6]), Batch(model.runner, model.setup)
    full, *others = batch.run(sessions, [[1], [2], [3]])
    assert isinstance(full, ContextFullError) and "32 are in use and 1 more do not fit" in str(full)
    assert sessions[0].n_past == 32 and [session.n_past for session in sessions[1:]] == [6, 7]
    expected = [session.decode(token) for session, token in zip(sessions_of(model, [32, 5, 6])[1:], [2, 3])]
    assert all(np.array_equal(a, b) for a, b in zip(others, expected))


def test_only_the_session_that_met_damage_gets_an_error(small_model, load, monkeypatch):
    """... and the others the logits that they have alone."""
    model = load(small_model())
    sessions, batch = sessions_of(model, [4, 5]), Batch(model.runner, model.setup)
    expected = sessions_of(model, [4, 5])[1].decode(8)

    def damaged(ids):
        raise DamagedWeightsError("the weights are damaged")
    monkeypatch.setattr(sessions[0], "begin", lambda ids, *args: damaged(ids))
    monkeypatch.setattr(batch, "_bind", lambda parts, n_outputs: type("Bound", (), {"begin": lambda self, *args: damaged(0)})())
    first, second = batch.run(sessions, [[7], [8]])
    assert isinstance(first, PydsaError) and np.array_equal(second, expected)
    assert [session.n_past for session in sessions] == [4, 6]


def test_memory_of_logits_is_used_again(small_model, load):
    """... but what a step gave stays as it is until the next one has given its own."""
    model = load(small_model())
    sessions, batch = sessions_of(model, [3, 4]), Batch(model.runner, model.setup)
    given = [batch.run(sessions, [[7], [8]])]
    kept = np.array(given[0])
    step = batch.begin(sessions, [[9], [9]])
    assert np.array_equal(given[0], kept)
    given.append(step.finish())
    given += [batch.run(sessions, [[i], [i]]) for i in range(4)]
    assert len({logits[0].ctypes.data for logits in given}) == 2


def test_bound_steps_are_kept_for_their_sessions_only(small_model, load):
    model = load(small_model())
    batch = Batch(model.runner, model.setup)
    sessions = sessions_of(model, [3, 4])

    def bind(sessions):
        return batch._bind([(session, [1], session.n_past) for session in sessions], len(sessions))
    bound = bind(sessions)
    assert bind(sessions) is bound and bind(sessions[::-1]) is not bound
    for _ in range(KEPT):
        bind(sessions_of(model, [2, 2]))
    assert len(batch._bound) == KEPT and bind(sessions) is not bound


@pytest.mark.parametrize("spec, options", [({}, {}), ({}, dict(attention="masked")), (dict(arch="deepseek2"), {})])
def test_prompts_together(small_model, load, spec, options):
    """Some tokens of several sessions, one of another; some pass top_k."""
    model = load(small_model(**spec), **options)
    lengths, tokens = [3, 30, 11, 8], [IDS[40:47], IDS[50:51], IDS[60:75], IDS[80:82]]
    expected = [session.prefill(mine) for session, mine in zip(sessions_of(model, lengths), tokens)]
    sessions, batch = sessions_of(model, lengths), Batch(model.runner, model.setup)
    for got, logits in zip(batch.run(sessions, tokens), expected):
        np.testing.assert_allclose(got, logits, rtol=1e-3, atol=1e-4)
    for i, (session, n, mine) in enumerate(zip(sessions, lengths, tokens)):
        assert session.tokens == IDS[i:i + n] + mine
        other = model.session()
        other.prefill(session.tokens)
        np.testing.assert_allclose(session.decode(5), other.decode(5), rtol=1e-3, atol=1e-4)


def test_rows_that_are_cut_and_pasted_are_those_of_the_other_session(small_model, load):
    model = load(small_model(), kv_type="i16")
    first, second = model.session(), model.session()
    first.prefill(IDS[:30])
    second.prefill(IDS[:28])
    second.truncate(4)
    second.paste(IDS[4:30], first.cut(4, 30))
    assert second.tokens == IDS[:30] and np.array_equal(second.decode(9), first.decode(9))
    with pytest.raises(ContextFullError):
        second.paste([1] * model.n_ctx, first.cut(0, 1))
