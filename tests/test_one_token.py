"""What a GPU does for one token: norms with sums and rounding, top-k of one row, attention over chosen rows.

Float64 is the measure. The kernels run as PTX, in the simulator where it knows their instructions, and on a GPU.
"""
import numpy as np
import pytest
from helpers import DEVICE, IN_SIMULATOR, integers, nmse, normal, rng

if DEVICE != "cuda":
    pytest.skip("these are kernels of GPUs", allow_module_level=True)

from pydsa.backends import cuda  # noqa: E402
from pydsa.backends.cuda import top_k_one  # noqa: E402
from pydsa.backends.cuda.fused_kernels import MOST, add_norm, norm_is_wide  # noqa: E402
from pydsa.backends.cuda.int8x2.linear import scratch_for  # noqa: E402


def unpacked(made, n):
    """The float64 values that an Int8x2 stands for, [rows, n], and its sums."""
    words, scales = made.packed.get(), made.scales.get().astype(np.float64)
    quads = words.view(np.int8).reshape(len(words), -1, 2, 2, 32, 16)      # tile, half, high or low, group, value
    whole = (256 * quads[:, :, :, 0].astype(int) + quads[:, :, :, 1]).transpose(0, 1, 3, 2, 4).reshape(len(words), -1)[:, :n]
    return whole * np.repeat(scales, 32, 1), made.sums.get()


WIDTHS = [32, 64] if IN_SIMULATOR else [32, 1056, 4128, 7168, 8192]


@pytest.mark.parametrize("n_added", [0, 1, 2])
@pytest.mark.parametrize("n", WIDTHS)
def test_norm_with_sums_and_rounding(n, n_added):
    """Widths of a part of a block, of a block and a bit, and of two."""
    x, y, z, w = normal(1, n), normal(2, n)[:1], normal(3, n)[:1], normal(n)
    added, total = [x], x.astype(np.float64)
    for other in (y, z)[:n_added]:
        total = total + other
        added += [other, np.full_like(x, np.nan)]
    added, out = [cuda.upload(a) for a in added], cuda.upload(np.full_like(x, np.nan))
    made = scratch_for(out)
    assert norm_is_wide(added, out, cuda.upload(w))
    add_norm(added, out, cuda.upload(w), np.float32(1e-6), made)
    expected = total / np.sqrt((total ** 2).mean() + 1e-6) * w
    met = out.get()
    assert nmse(met, expected) < 1e-13
    assert all(nmse(a.get(), sum(map(np.float64, (x, y, z)[:i + 2]))) < 1e-14 for i, a in enumerate(added[2::2]))
    rounded, sums = unpacked(made, n)
    assert nmse(rounded, met) < 3e-9 and np.allclose(sums, rounded.reshape(1, -1, 16).sum(-1), rtol=1e-5, atol=1e-5)


def test_norms_that_are_not_wide():
    """Rows that are too long or not aligned to 16 bytes are left to the ops."""
    def is_wide(x):
        return norm_is_wide([x], x, cuda.empty((x.shape[1],), np.float32))
    rows = cuda.empty((2, MOST + 64), np.float32)
    assert is_wide(rows[:, :MOST]) and not is_wide(rows) and not is_wide(rows[:, 1:33]) and is_wide(rows[:, 4:36])
    uneven = cuda.empty((2, 33), np.float32)
    assert not is_wide(uneven[:, :32]) and is_wide(uneven[:1, :32])


def best_of(row, k):
    """The places of the k largest numbers of a row, ascending, then -1.

    Of equals the first are chosen.
    """
    numbers = np.flatnonzero(row > -np.inf)
    chosen = np.sort(numbers[np.argsort(-row[numbers], kind="stable")][:k])
    return np.pad(chosen, (0, k - chosen.size), constant_values=-1)


def a_row(n, kind):
    """Scores: normal, of few values, near each other, few, or together.

    "few" are few numbers among -inf and NaN; "together" has the largest at one place.
    """
    x = {"normal": normal, "ties": lambda n: integers(-2, 2, n), "near": lambda n: np.float32(1) + np.float32(1e-6) * normal(n)}
    row = x.get(kind, normal)(n)
    if kind == "few":
        row[rng(n).random(n) < 0.97] = -np.inf
        row[::7] = np.nan
    if kind == "together":
        row[n // 3:n // 3 + 80] += 100
    return row


G = top_k_one.GROUP
ROWS = [(1, 3), (G, 9), (G + 1, 5)] if IN_SIMULATOR else [
    (3, 8), (G + 1, 2048), (2 * G, 2048), (2 * G + 2, 64), (70_003, 300), (163_840, 2048)]


@pytest.mark.parametrize("kind", ["normal", "ties", "near", "few", "together"])
@pytest.mark.parametrize("n, k", ROWS)
def test_top_k_of_one_row(n, k, kind):
    """Rows of one part and of several, whose lengths are multiples of little."""
    row = a_row(n, kind)
    scores, out = cuda.upload(row[None]), cuda.upload(np.full((1, k), 77, np.int32))
    assert top_k_one.takes(scores, k)
    top_k_one.choose_one(out, scores)
    assert np.array_equal(out.get()[0], best_of(row, k))


@pytest.mark.parametrize("end", [1, 2, G // 2, 2 * G, 2 * G + 1, 4 * G, 5 * G])
def test_top_k_of_a_row_that_ends_early(end):
    """What lies behind the position is not looked at, in one part or several."""
    n, k = 5 * G + 1, 7 if IN_SIMULATOR else 1000
    row = a_row(n, "normal")
    row[end:] = 1000
    out, positions = cuda.upload(np.full((3, k), 77, np.int32)), cuda.upload(np.array([5, 0, end - 1]))
    top_k_one.choose_one(out, cuda.upload(row[None]), positions, 2)
    met = out.get()
    assert (met[:2] == 77).all() and np.array_equal(met[2], best_of(row[:end], k))


def test_rows_that_one_block_cannot_choose_from():
    """Several rows, and those whose parts are too long or choose too much."""
    def takes(n, k, rows=1):
        return top_k_one.takes(cuda.empty((rows, n), np.float32), k)
    assert takes(G, 8) and not takes(G, 8, 2) and not takes(8 * top_k_one.MOST, 2 * top_k_one.MOST)
    assert not takes(4 * top_k_one.MOST, top_k_one.MOST // 2)
    assert not top_k_one.takes(cuda.empty((1, G + 1), np.float32)[:, 1:], 8)
