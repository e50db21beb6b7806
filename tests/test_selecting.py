"""session.select: functions choose the keys in place of the indexers."""
import numpy as np
import pytest
from helpers import nmse, random_ids

from pydsa import PydsaError, SessionFileError, selections
from pydsa.engine.batch import Batch
from pydsa.selections.selector import checked

IDS = random_ids(60)       # top_k is 12


def run(session, select=None, n=34):
    """A prompt in ubatches, and tokens one by one -> logits [., n_vocab]."""
    session.select = select
    return np.stack([session.prefill(IDS[:24]), *map(session.decode, IDS[24:n])])


def chosen(session, select, n=34):
    with session.record(routing=False) as recording:
        run(session, select, n)
    return recording


@pytest.mark.parametrize("attention, arch", [("sparse", "glm-dsa"), ("auto", "deepseek32")])
def test_the_indexers_own_choice_gives_the_same_bits(small_model, load, attention, arch):
    shared = {"indexer_types": "FFSS"} if arch == "glm-dsa" else {}
    model = load(small_model(arch=arch, n_layer=4, **shared), attention=attention, n_ubatch=16)
    logits, session = run(model.session()), model.session()
    assert np.array_equal(run(session, selections.indexer)[4:], logits[4:]) and session.select is selections.indexer
    session.truncate(0)
    assert np.array_equal(run(session), logits) and session.select is None


def test_golden_models_keep_their_logits(golden, load):
    """With the indexer's choice as a function."""
    path, arrays = golden("glm-q8_0")
    model = load(path, attention="auto", n_ctx=256)
    session, plain = model.session(), model.session()
    session.select = selections.indexer
    n = len(arrays["tokens"])
    assert n > model.top_k and np.array_equal(session.logits(arrays["tokens"]), plain.logits(arrays["tokens"]))


def test_all_keys_are_dense_attention(small_model, load):
    path = small_model(n_layer=2)
    dense = run(load(path, attention="dense", n_ubatch=16).session())
    every = load(path, attention="sparse", n_ubatch=16, dsa_top_k=60)
    assert nmse(run(every.session(), selections.every_key()), dense).max() < 1e-10
    plain = load(path, n_ubatch=64, dsa_top_k=59, n_ctx=61)
    session = plain.session()
    session.select = selections.every_key()
    assert plain.setup.schedule.variant(0, 58, True) == "mha+choice"
    assert nmse(session.prefill(IDS[:58]), load(path, attention="dense", n_ubatch=64).session().prefill(IDS[:58])) < 1e-10


@pytest.mark.parametrize("select", [selections.sliding_window(5, sinks=2), selections.random(3), selections.oracle(),
                                    selections.union(selections.indexer, selections.sliding_window(4))], ids=lambda select: select.__name__)
def test_the_cpu_and_the_reference_agree(small_model, load, select):
    path = small_model(n_layer=2)
    here, exact = (load(path, attention="auto", n_ubatch=16, device=device).session() for device in ("cpu", "reference"))
    mine, theirs = chosen(here, select), chosen(exact, select)
    assert not mine.all_keys.any()      # up to top_k tokens too
    for layer in mine.layers:
        assert np.array_equal(mine.selection[layer], theirs.selection[layer])
    here.truncate(0), exact.truncate(0)
    assert nmse(run(here, select), run(exact, select)).max() < 1e-9


def test_what_the_functions_choose(small_model, load):
    session = load(small_model(n_layer=2), attention="auto", n_ubatch=16).session()
    own = chosen(session, selections.indexer)
    session.truncate(0)
    window = chosen(session, selections.sliding_window(3, sinks=1)).selection[1]
    assert [sorted({0, *range(max(0, p - 2), p + 1)}) for p in range(34)] == [[key for key in row if key >= 0] for row in window.tolist()]
    session.truncate(0)
    some = chosen(session, selections.random(1)).selection
    assert all((some[i] >= 0).sum(axis=1).tolist() == [min(p + 1, 12) for p in range(34)] for i in (0, 1))
    assert not np.array_equal(some[0], some[1]) and not np.array_equal(some[0], own.selection[0])
    session.truncate(0)
    with session.record(mass=True) as best:
        run(session, selections.oracle())
    session.truncate(0)
    with session.record(mass=True) as others:
        run(session, selections.random(2))
    assert all((best.mass[0] >= others.mass[0] - 1e-6).tolist()) and best.mass[0].mean() > others.mass[0].mean() + 0.01
    session.truncate(0)
    both = chosen(session, selections.union(selections.indexer, selections.sliding_window(4), share=0.7)).selection[0]
    for p in range(14, 34):
        assert {*range(p - 3, p + 1)} <= {*both[p].tolist()} and len({*both[p].tolist()} & {*own.selection[0][p].tolist()}) >= 8


def test_a_choice_shows_scores_and_attention(small_model, load):
    seen = []

    def look(choice):
        seen.append(choice)
        return selections.best(choice, choice.scores())

    session = load(small_model(n_layer=3, arch="glm-dsa", indexer_types="FFS"), attention="sparse", n_ubatch=16, index_type="f32").session()
    recording, plain = chosen(session, look), chosen(load(small_model(n_layer=3, arch="glm-dsa", indexer_types="FFS"), attention="sparse",
                                                          n_ubatch=16, index_type="f32").session(), None)
    assert all(np.array_equal(recording.selection[i], plain.selection[i]) for i in range(3))
    assert [choice.layer for choice in seen[:4]] == [0, 1, 0, 1]        # layer 2 shares the choice of layer 1
    assert seen[2].positions.tolist() == list(range(16, 24)) and seen[2].n_keys == 24 and seen[2].top_k == 12
    assert seen[2].scores().shape == (8, 24) and (seen[2].scores()[0, 17:] == -np.inf).all()
    with pytest.raises(PydsaError, match="attention.. of a Choice was called after its step had gone on"):
        seen[2].attention()


@pytest.mark.parametrize("value, message", [
    (3, "returned int of another shape than expected: a row of keys for each of 2 tokens"), ([[1]], "a row of keys for each of 2 tokens"),
    ([[1], [[2]]], "of another shape"), ([[1.0], [2]], "returned float64, expected integers or a mask"),
    ([[0, 6], [1]], "chose key 6 for the token at position 5, expected 0 to 5"), ([[0], [-2]], "chose key -2"),
    ([[0, 1, 2, 3], [1]], "chose 4 keys for the token at position 5, but only 3 fit"),
    ([[True] * 3, [1]], "a mask of 3 keys, expected 7"), (None, "returned NoneType"), ([["a"], [1]], "expected integers")])
def test_what_a_function_returns_is_checked(value, message):
    def mine(choice):
        return value
    with pytest.raises(PydsaError, match=f"session.select: mine .*{message}"):
        checked(mine, value, np.array([5, 6]), 3)


def test_forms_of_what_a_function_returns():
    mask = np.arange(7) == np.array([[2], [6]])
    for value, expected in (([[3, 0, 3, -1, 0], []], [[0, 3, -1], [-1, -1, -1]]), (mask, [[2, -1, -1], [6, -1, -1]]),
                            (np.array([[5, 4], [6, 0]], np.uint8), [[4, 5, -1], [0, 6, -1]])):
        found = checked(None, value, np.array([5, 6]), 3)
        assert found.tolist() == expected and found.dtype == np.int32


def test_errors_leave_the_session_as_it_was(small_model, load):
    session = load(small_model(n_layer=2), attention="sparse", n_ubatch=16).session()
    logits = run(session)[-1]
    session.select = lambda choice: [[99]] * len(choice.positions)
    with pytest.raises(PydsaError, match="session.select: <lambda> chose key 99 for the token at position 33"):
        session.truncate(33), session.decode(IDS[33])
    session.select = None
    assert session.n_past == 33 and np.array_equal(session.decode(IDS[33]), logits)


def test_caches_of_different_selections_are_not_mixed_unseen(small_model, load, tmp_path):
    """Prefixes that another function ran are run again, and not saved."""
    model, window = load(small_model(n_layer=2), attention="sparse", n_ubatch=16), selections.sliding_window(3)
    session, fresh = model.session(), model.session()
    run(session)
    session.select = window
    assert session.reuse(IDS) == 0
    expected = run(fresh, window)
    assert np.array_equal(run(session, window), expected)
    assert session.reuse(IDS[:30]) == 29
    session.select = None
    session.prefill(IDS[29:34])
    session.select = window
    assert session.reuse(IDS) == 29
    with pytest.raises(SessionFileError, match="session.select chose the keys from token 0 on"):
        session.save(tmp_path / "a")
    session.truncate(0)
    session.select = None
    run(session)
    session.save(tmp_path / "a")
    session.select = window
    session.load(tmp_path / "a")        # as prefill, then a change: what ran before stays as it is
    assert session.n_past == 34 and session.reuse(IDS) == 0
    session.load(tmp_path / "a")
    with pytest.raises(PydsaError, match="cannot be timed"):
        session.timed(IDS[:2])
    with pytest.raises(PydsaError, match="with hooks"):
        Batch(model.runner, model.setup).run([session, fresh], [[1], [2]])


def test_where_nothing_can_be_selected(small_model, load):
    for model, message in ((load(small_model(n_layer=2), attention="masked"), "load the model with attention='sparse'"),
                           (load(small_model(n_layer=2), attention="dense"), "load the model with attention='sparse'"),
                           (load(small_model(n_layer=2), n_ctx=12), "n_ctx. of more than top_k, 12, tokens"),
                           (load(small_model(arch="deepseek2", n_layer=2)), "deepseek2 has no indexer")):
        with pytest.raises(PydsaError, match=message):
            model.session().select = selections.indexer
        model.session().select = None
    with pytest.raises(PydsaError, match="session.select is 3, expected a function"):
        load(small_model(n_layer=2), attention="sparse").session().select = 3
    for make in (lambda: selections.union(selections.indexer, selections.indexer, 1), lambda: selections.sliding_window(0),
                 lambda: selections.union(selections.indexer, selections.indexer, "half"), lambda: selections.random(-1)):
        with pytest.raises(PydsaError, match="share of the first|n is 0|seed is -1"):
            make()
