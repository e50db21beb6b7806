"""Cached prefixes: what is shared, moved to files, forgotten, and whose it is."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydsa.saved import prefixes as module
from pydsa.saved.prefixes import Prefixes


class Cache:
    row_bytes = 8


class Session:
    """A session of which only the tokens and their rows matter.

    A row is the token and its position, and a hash of all tokens before it, as a real row depends on them.
    """

    def __init__(self, tokens=()):
        self.tokens, self.caches, self.rows = [], {"latents": Cache()}, np.empty((0, 8), np.uint8)
        self.run(tokens)

    @property
    def n_past(self):
        return len(self.tokens)

    def run(self, tokens):
        for token in tokens:
            self.tokens.append(int(token))
            row = np.array([hash(tuple(self.tokens)) & (1 << 62) - 1], np.int64).view(np.uint8)
            self.rows = np.concatenate([self.rows, row[None]])

    def cut(self, start, stop):
        return [self.rows[start:stop].copy()]

    def paste(self, tokens, rows):
        assert len(tokens) == len(rows[0])
        self.tokens += tokens
        self.rows = np.concatenate([self.rows, rows[0]])


def ids(*tokens):
    return np.array(tokens, np.int32)


def extended(prefixes, owner, tokens, n_past=0):
    """How many tokens a session with the first n_past gains.

    Its rows must be those of the tokens.
    """
    session, expected = Session(tokens[:n_past]), Session(tokens)
    n = prefixes.extend(owner, session, np.asarray(tokens, np.int32))
    assert session.tokens == list(tokens)[:n_past + n] and np.array_equal(session.rows, expected.rows[:n_past + n])
    return n


def test_a_conversation_comes_back_as_far_as_it_agrees():
    prefixes = Prefixes(1 << 20)
    prefixes.add("a", Session([1, 2, 3, 4, 5]))
    assert extended(prefixes, "a", [1, 2, 3, 4, 5, 6]) == 5
    assert extended(prefixes, "a", [1, 2, 9, 4, 5, 6]) == 2
    assert extended(prefixes, "a", [9, 1, 2]) == 0
    assert extended(prefixes, "a", [1, 2, 3, 4, 7], n_past=3) == 1
    assert prefixes.match("a", ids(1, 2, 3)) == 3


def test_a_common_beginning_is_kept_once():
    prefixes = Prefixes(1 << 20)
    system = list(range(100))
    for i in range(5):
        prefixes.add("a", Session([*system, 200 + i, 201 + i]))
    assert prefixes.n_bytes == 8 * (100 + 5 * 2)
    assert all(extended(prefixes, "a", [*system, 200 + i, 201 + i]) == 102 for i in range(5))


def test_owners_share_nothing():
    prefixes = Prefixes(1 << 20)
    prefixes.add("a", Session([1, 2, 3]))
    assert prefixes.match("b", ids(1, 2, 3)) == 0 == extended(prefixes, "b", [1, 2, 3])


def test_what_was_used_longest_ago_is_forgotten():
    prefixes = Prefixes(8 * 10)
    for first in (1, 2):
        prefixes.add("a", Session([first, 5, 5, 5]))
    assert extended(prefixes, "a", [1, 5, 5, 5]) == 4       # used again
    prefixes.add("a", Session([3, 5, 5, 5]))
    assert [prefixes.match("a", ids(first, 5, 5, 5)) for first in (1, 2, 3)] == [4, 0, 4]
    prefixes.add("a", Session(range(50)))           # never fits, and must not end what does
    assert prefixes.match("a", ids(*range(50))) in (0, 1, 4) and prefixes.n_bytes <= 8 * 10


def test_without_memory_nothing_is_kept():
    prefixes = Prefixes(0)
    prefixes.add("a", Session([1, 2, 3]))
    assert prefixes.match("a", ids(1, 2, 3)) == 0


def test_when_the_machine_has_no_memory_left_nothing_is_added(monkeypatch):
    prefixes = Prefixes(1 << 20)
    prefixes.add("a", Session([1, 2, 3]))
    monkeypatch.setattr(module.limits, "available", lambda: module.limits.Memory(4, "bytes are free"))
    prefixes.add("a", Session([4, 5, 6]))
    assert prefixes.match("a", ids(4, 5, 6)) == 0


def test_the_free_memory_is_asked_for_once(monkeypatch):
    """It takes a quarter of a millisecond, while all answers wait."""
    asked = []
    monkeypatch.setattr(module.limits, "available", lambda: asked.append(1) or module.limits.Memory(1 << 40, "memory"))
    prefixes = Prefixes(1 << 20)
    prefixes.add("", Session(range(9)))
    assert len(asked) == 1
    prefixes.add("", Session(range(9)))     # nothing is new
    assert len(asked) == 1


def test_what_does_not_fit_goes_to_files_and_comes_back(tmp_path):
    prefixes = Prefixes(8 * 10, tmp_path)
    for first in range(5):
        prefixes.add("a", Session([first, 5, 6, 7, 8]))
    assert prefixes.n_bytes == 8 * 10 and prefixes.n_file_bytes == 8 * 15 and len(list(tmp_path.iterdir())) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    assert all(extended(prefixes, "a", [first, 5, 6, 7, 8, 9]) == 5 for first in range(5))
    assert prefixes.n_bytes <= 8 * 10 and prefixes.n_bytes + prefixes.n_file_bytes == 8 * 25
    prefixes.close()
    assert not list(tmp_path.iterdir()) and prefixes.n_bytes == prefixes.n_file_bytes == 0


def test_what_is_larger_than_the_memory_goes_to_a_file(tmp_path):
    long = list(range(30))
    prefixes = Prefixes(80, tmp_path)                                  # ten tokens
    prefixes.add("a", Session(long))
    assert (prefixes.n_bytes, prefixes.n_file_bytes) == (0, 240)
    for _ in range(2):
        assert extended(prefixes, "a", long) == 30 and prefixes.n_bytes == 0
    prefixes.add("a", Session(long[:5] + [99] * 20))
    assert extended(prefixes, "a", long) == 30 and extended(prefixes, "a", long[:5] + [99] * 20) == 25
    assert prefixes.n_bytes <= 80 and prefixes.n_bytes + prefixes.n_file_bytes == 8 * 50
    alone = Prefixes(80)
    alone.add("a", Session(long))
    small = Prefixes(80, tmp_path, max_file_bytes=239)
    small.add("a", Session(long))
    assert alone.match("a", ids(*long)) == small.match("a", ids(*long)) == 0
    prefixes.close()
    assert not list(tmp_path.iterdir())


def test_files_have_a_limit_too(tmp_path):
    prefixes = Prefixes(8 * 10, tmp_path, max_file_bytes=8 * 10)
    for first in range(9):
        prefixes.add("a", Session([first, 5, 6, 7, 8]))
    assert [prefixes.match("a", ids(first, 5, 6, 7, 8)) for first in range(9)] == [0] * 5 + [5] * 4


@pytest.mark.parametrize("harm", ["gone", "short", "changed"])
def test_a_damaged_file_is_forgotten(tmp_path, harm):
    prefixes = Prefixes(8 * 4, tmp_path)
    prefixes.add("a", Session([1, 5, 6, 7]))
    prefixes.add("a", Session([2, 5, 6, 7]))
    path, = tmp_path.iterdir()
    if harm == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-8] if harm == "short" else b"?" + data[1:])
    assert extended(prefixes, "a", [1, 5, 6, 7]) == 0 and extended(prefixes, "a", [2, 5, 6, 7]) == 4
    assert prefixes.n_file_bytes == 0


def test_a_folder_that_cannot_be_written_is_as_none(tmp_path):
    prefixes = Prefixes(8 * 4, tmp_path / "missing")
    prefixes.add("a", Session([1, 5, 6, 7]))
    prefixes.add("a", Session([2, 5, 6, 7]))
    assert prefixes.match("a", ids(1, 5, 6, 7)) == 0 and extended(prefixes, "a", [2, 5, 6, 7]) == 4


def test_a_conversation_of_thousands_of_turns():
    """A chain of as many nodes is walked without recursion."""
    prefixes, session = Prefixes(1 << 20), Session()
    for i in range(1200):
        session.tokens.append(i % 7)
        session.rows = np.zeros((i + 1, 8), np.uint8)
        prefixes.add("a", session)
    assert prefixes.match("a", np.array(session.tokens, np.int32)) == 1200
    prefixes.close()
    assert prefixes.n_bytes == 0


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("ab"), sequences), min_size=1, max_size=25), st.integers(4, 40), st.booleans())
def test_whatever_is_added_rows_are_right_and_sums_agree(tmp_path_factory, conversations, room, files):
    folder = tmp_path_factory.mktemp("rows") if files else None
    prefixes = Prefixes(8 * room, folder, max_file_bytes=8 * room)
    for owner, tokens in conversations:
        extended(prefixes, owner, tokens)
        prefixes.add(owner, Session(tokens))
        assert len(tokens) > room or prefixes.match(owner, ids(*tokens)) == len(tokens)
        assert prefixes.n_bytes == sum(node.n_bytes for node in prefixes._in_memory) <= 8 * room
        assert prefixes.n_file_bytes == sum(node.n_bytes for node in prefixes._in_files) <= 8 * room
        if files:
            assert len(list(folder.iterdir())) == len(prefixes._in_files)
    prefixes.close()
    assert not files or not list(folder.iterdir())
