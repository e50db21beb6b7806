"""Top-k of many rows on a GPU, against a sort."""
import numpy as np
import pytest
from helpers import DEVICE, IN_SIMULATOR, integers, normal, rng

if DEVICE != "cuda" or IN_SIMULATOR:
    pytest.skip("these are kernels of GPUs", allow_module_level=True)

from pydsa.backends import cuda  # noqa: E402
from pydsa.backends.cuda import top_k_rows  # noqa: E402

ROOM, LOOP = top_k_rows.ROOM, top_k_rows.PER_BLOCK


def best_of(row, k):
    """The places of the k largest numbers of a row, ascending, then -1.

    Of equals the first are chosen.
    """
    numbers = np.flatnonzero(row > -np.inf)
    chosen = np.sort(numbers[np.argsort(-row[numbers], kind="stable")][:k])
    return np.pad(chosen, (0, k - chosen.size), constant_values=-1)


def some_rows(n, kind):
    """Three rows of scores: normal, of few values, near each other, few, equal, or with both zeros.

    "few" are few numbers among -inf and NaN; "equal" has some larger ones in one row.
    """
    x = {"ties": lambda: integers(-2, 2, 3, n), "near": lambda: np.float32(1) + np.float32(1e-6) * normal(3, n),
         "zeros": lambda: integers(-1, 0, 3, n) * np.float32(0)}.get(kind, lambda: normal(3, n))()
    if kind == "few":
        x[rng(n).random((3, n)) < 0.97] = -np.inf
        x[:, ::7] = np.nan
    if kind == "equal":
        x[:] = 1
        x[1, n // 2:n // 2 + 90] = 2
    return x


# a part of a loop, one and a bit; more than the list has room for, where whole digits are equal; all of the list chosen
CASES = [(3, 8, "normal"), (LOOP + 1, 2048, "normal"), (LOOP - 2, 300, "ties"), (LOOP, 70, "few"), (700, 64, "zeros"),
         (3 * LOOP + 6, 256, "equal"), (2 * ROOM + 3, 2048, "near"), (2 * ROOM + 4, ROOM, "ties"), (ROOM + 9, ROOM, "normal")]


@pytest.mark.parametrize("n, k, kind", CASES)
def test_top_k_of_rows(n, k, kind):
    """Whole rows, and rows that end with a position.

    What lies behind that was never written.
    """
    x = some_rows(n, kind)
    scores = cuda.empty((3, -(-n // 4) * 4), np.float32)[:, :n]
    ends = np.array([max(1, n // 3), n - 1, n])
    for ended in (True, False):
        for row in range(3):
            scores[row, :ends[row] if ended else n].set(x[row, :ends[row] if ended else n])
        out = cuda.upload(np.full((4, k), 77, np.int32))
        assert top_k_rows.takes(scores, k) or n > top_k_rows.SHORT
        top_k_rows.choose_rows(*((out, scores, cuda.upload(np.array([5, *ends - 1])), 1) if ended else (out[1:], scores)))
        met = out.get()
        assert (met[0] == 77).all()
        for row in range(3):
            assert np.array_equal(met[row + 1], best_of(x[row, :ends[row] if ended else n], k)), (row, ended)


def test_rows_that_are_chosen_from_otherwise():
    """One row, few long ones, many chosen ones, and rows that are not aligned."""
    def takes(n_rows, n, k=8, first=0, width=None):
        return top_k_rows.takes(cuda.empty((n_rows, width or n), np.float32)[:, first:first + n], k)
    assert takes(2, 64) and takes(2, top_k_rows.SHORT) and takes(top_k_rows.FEW, top_k_rows.SHORT + 4)
    assert not takes(1, 64) and not takes(top_k_rows.FEW - 1, top_k_rows.SHORT + 4) and not takes(2, 64, ROOM + 1)
    assert not takes(2, 64, first=1, width=68) and not takes(2, 65) and takes(2, 65, width=68)
