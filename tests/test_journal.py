"""The journal of a pipeline: what it keeps of the steps and rows that made the caches, and in which order."""
import numpy as np
import pytest
from helpers import rng

from pydsa.executor.graph import CacheRef
from pydsa.stages.journal import Journal, Ran
from pydsa.stages.wire import Part

KEYS, LATENTS = CacheRef("index_keys", 0), CacheRef("latents", 1)


def ran(*parts, n_outputs=1, variant="dense", ids=None):
    """A step of parts (session, n_past, n_tokens). ids: None: the positions."""
    positions = np.concatenate([np.arange(n_past, n_past + n) for _, n_past, n in parts]).astype(np.int32)
    return Ran(variant, [Part(*part) for part in parts], positions if ids is None else np.array(ids, np.int32), n_outputs)


def steps(journal, *sessions):
    """What is run again: [(parts as tuples, ids)]."""
    return [([tuple(part) for part in made.parts], made.ids.tolist()) for made in journal.replay(set(sessions)) if isinstance(made, Ran)]


def test_steps_come_again_in_their_shapes():
    journal = Journal()
    journal.add(ran((1, 0, 4), n_outputs=0))
    journal.add(ran((1, 4, 3)))
    for n_past in range(7, 10):
        journal.add(ran((1, n_past, 1)))
    assert steps(journal, 1) == [([(1, 0, 4)], [0, 1, 2, 3]), ([(1, 4, 3)], [4, 5, 6]), *[([(1, n, 1)], [n]) for n in range(7, 10)]]
    assert [made.n_outputs for made in journal.replay({1})] == [0, 1, 1, 1, 1]
    assert len(journal) == 3        # tokens that follow each other are one entry
    assert not steps(journal, 2)


@pytest.mark.parametrize("at, expected", [(0, []), (3, [(0, 4)]), (4, [(0, 4)]), (5, [(0, 4), (4, 1)]),
                                          (8, [(0, 4), *[(n, 1) for n in range(4, 8)]])])
def test_tokens_that_are_replaced_do_not_come_again(at, expected):
    journal = Journal()
    journal.add(ran((1, 0, 4)))
    for n_past in range(4, 8):
        journal.add(ran((1, n_past, 1)))
    journal.add(ran((1, at, 2)))
    assert [parts[0][1:] for parts, _ in steps(journal, 1)] == [*expected, (at, 2)]


def test_a_variant_of_its_own_is_kept():
    journal = Journal()
    for n_past, variant in enumerate(("dense", "dense", "sparse")):
        journal.add(ran((1, n_past, 1), variant=variant))
    assert [made.variant for made in journal.replay({1})] == ["dense", "dense", "sparse"]


def test_steps_of_several_sessions_stay_while_one_needs_them():
    journal = Journal()
    journal.add(ran((1, 0, 2), (2, 0, 3), (1, 2, 1), (2, 3, 1), n_outputs=2, ids=[1, 2, 3, 4, 5, 6, 7]))
    journal.add(ran((1, 0, 5)))
    assert [parts for parts, _ in steps(journal, 1, 2)] == [[(1, 0, 2), (2, 0, 3), (1, 2, 1), (2, 3, 1)], [(1, 0, 5)]]
    journal.closed(1)
    (made,) = journal.replay({2})
    assert made.parts == [(2, 0, 3), (2, 3, 1)] and made.ids.tolist() == [3, 4, 5, 7] and made.n_outputs == 1
    journal.closed(2)
    assert len(journal) == 0


@pytest.mark.parametrize("in_folder", [False, True])
def test_restored_rows_come_again(tmp_path, in_folder):
    journal = Journal(tmp_path if in_folder else None)
    rows = {ref: rng(width).integers(0, 256, (6, width)).astype(np.uint8) for ref, width in ((KEYS, 3), (LATENTS, 5))}
    journal.add(ran((1, 0, 2)))
    for ref in rows:        # in pieces, cache after cache
        journal.restored(1, ref, 2, rows[ref][:4])
        journal.restored(1, ref, 6, rows[ref][4:])
    assert len(journal) == 2
    for _ in range(2):
        first, *restored = journal.replay({1})
        assert isinstance(first, Ran)
        met = {ref: np.concatenate([some for _, other, _, some in restored if other == ref]) for ref in rows}
        assert all((met[ref] == rows[ref]).all() for ref in rows)
        assert [(ref, start) for _, ref, start, _ in restored] == [(KEYS, 2), (KEYS, 6), (LATENTS, 2), (LATENTS, 6)]
    journal.add(ran((1, 5, 1)))
    assert [type(made) for made in journal.replay({1})][-1] is Ran and len(journal) == 3
    journal.restored(1, KEYS, 5, rows[KEYS][:1])
    assert [made[1:3] for made in journal.replay({1})][-1] == (KEYS, 5) and len(journal) == 3
    journal.add(ran((1, 0, 1)))
    assert len(journal) == 1 and not list(tmp_path.iterdir())


def test_what_is_saved_does_not_run_again():
    journal = Journal()
    journal.add(ran((1, 0, 4), (2, 0, 4)))
    journal.add(ran((1, 4, 4)))
    journal.saved(1, 8, "source")
    journal.add(ran((1, 8, 1)))
    assert [made if isinstance(made, tuple) and not isinstance(made, Ran) else made.parts for made in journal.replay({1, 2})] == [
        [(1, 0, 4), (2, 0, 4)], (1, None, 8, "source"), [(1, 8, 1)]]
    journal.add(ran((1, 6, 1)))         # the conversation goes on from an earlier place: only rows before it count
    assert [made[2] if made[1] is None else made.parts for made in journal.replay({1})][1:] == [6, [(1, 6, 1)]]
    journal.saved(1, 0, "nothing")
    assert [made.parts for made in journal.replay({1, 2})] == [[(1, 0, 4), (2, 0, 4)]]


def test_a_long_answer_takes_little_memory():
    journal = Journal()
    for n_past in range(2000):
        journal.add(ran((1, n_past, 1)))
        journal.add(ran((2, n_past, 1)))
    assert len(journal) == 2 and len(steps(journal, 1)) == 2000
