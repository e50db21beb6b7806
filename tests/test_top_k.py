"""top_k on adversarial rows, against Python's sorted().

Ties, signed zeros, denormals, NaN, infinities, and lengths around k.
"""
import numpy as np
import pytest
from helpers import choose, kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from pydsa.backends import reference
from pydsa.backends.cpu.top_k import SAMPLE_STRIDE, SAMPLED_RATIO, SAMPLED_SIZE


TINY = np.float32(1e-45)        # the smallest denormal
INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.0, -1.0, 3.4028234663852886e38, -3.4028234663852886e38, INF, -INF, NAN]


def oracle(row, k):
    """The k largest values, ties to the lowest index, without -inf and NaN.

    Indices ascend and are padded with -1.
    """
    numbers = [i for i, x in enumerate(row) if x > -INF]
    chosen = sorted(numbers, key=lambda i: (-row[i], i))[:k]
    return sorted(chosen) + [-1] * (k - len(chosen))


def top_k(backend, rows, k):
    rows = np.atleast_2d(np.asarray(rows, np.float32))
    out = np.full((len(rows), k), 77, np.int32)
    backend.top_k(out, rows.astype(backend.FLOAT))
    return out


def check(rows, k):
    rows = np.atleast_2d(np.asarray(rows, np.float32))
    expected = [oracle(row, k) for row in rows.tolist()]
    assert top_k(reference, rows, k).tolist() == expected
    assert top_k(kernels, rows, k).tolist() == expected


def spread(*values, n=300):
    """n values drawn from a few."""
    return np.random.default_rng(n).choice(np.float32(values), n)


def neighbours(x, n=300):
    """The n consecutive floats from x upwards, in random order.

    Many of them share all but the last bits.
    """
    start = np.float32(x).view(np.uint32)
    return np.random.default_rng(n).permutation(start + np.arange(n, dtype=np.uint32)).view(np.float32)


ROWS = {
    "all equal": np.full(300, 1.5),
    "all zero": np.zeros(300),
    "both zeros": spread(0.0, -0.0),
    "both zeros and denormals": spread(0.0, -0.0, TINY, -TINY),
    "two values": spread(1.0, 2.0),
    "two values, one rare": np.where(np.arange(300) % 37 == 36, 2.0, 1.0),
    "two neighbours": spread(1.0, np.nextafter(np.float32(1), np.float32(2))),
    "two negative neighbours": spread(-1.0, np.nextafter(np.float32(-1), np.float32(-2))),
    "neighbours of 1": neighbours(1),
    "neighbours of -1": neighbours(-1),
    "neighbours of 0": neighbours(0),
    "neighbours across an exponent": neighbours(np.nextafter(np.float32(2), np.float32(0))),
    "denormals": np.random.default_rng(0).integers(-40, 40, 300) * np.float64(TINY),
    "denormals and normals": spread(1e-40, -1e-40, 1.2e-38, -1.2e-38, 0.0),
    "ascending": np.arange(300) / 7,
    "descending": -np.arange(300) / 7,
    "all -inf": np.full(300, -INF),
    "all NaN": np.full(300, NAN),
    "-inf and NaN": spread(-INF, NAN),
    "-inf, NaN and a few": spread(-INF, NAN, -INF, NAN, 1.0, -3e38),
    "infinities": spread(INF, -INF, 1.0),
    "all +inf": np.full(300, INF),
    "negative NaN": np.where(np.arange(300) % 2, -np.float32(NAN), np.float32(-1)),
    "extremes": spread(3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -1e-45),
    "normal": np.random.default_rng(1).standard_normal(300),
    "heavy tails": np.random.default_rng(2).standard_cauchy(300) * np.float64(10.0) ** np.random.default_rng(3).integers(-30, 30, 300),
}


@pytest.mark.parametrize("k", choose([1, 64, 300, 301], [1, 2, 7, 64, 149, 299, 300, 301, 600]))
@pytest.mark.parametrize("name", ROWS)
def test_top_k(name, k):
    check(ROWS[name], k)


@pytest.mark.parametrize("k", choose([1, 8], [1, 2, 8, 255, 256]))
def test_lengths_around_k(k):
    rng = np.random.default_rng(k)
    for n in {1, max(1, k - 1), k, k + 1, 2 * k}:
        check(rng.standard_normal((5, n)), k)
        check(rng.integers(0, 3, (5, n)), k)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=1, max_size=60), st.integers(1, 70))
def test_any_floats(row, k):
    check(row, k)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.integers(1, 40))
def test_any_bits(bits, k):
    check(np.uint32(bits).view(np.float32), k)


def test_ties_are_the_same_every_time():
    rows = np.random.default_rng(0).integers(0, 4, choose((3, 100), (33, 500))).astype(np.float32)
    first = top_k(kernels, rows, 50)
    assert all(np.array_equal(top_k(kernels, rows, 50), first) for _ in range(choose(2, 25)))
    check(rows, 50)


def test_rows_do_not_mix():
    """A row alone gives what it gives among others."""
    rows = np.array([np.resize(row, 300) for row in ROWS.values()], np.float32)
    together = top_k(kernels, rows, 40)
    assert np.array_equal(together, np.concatenate([top_k(kernels, row, 40) for row in rows]))
    check(rows, 40)


def test_indices_ascend_and_padding_ends_the_row():
    rows = np.where(np.random.default_rng(0).random((choose(3, 40), 90)) < 0.5, -np.inf, ROWS["normal"][:90])
    for found in top_k(kernels, rows, 60):
        n = np.count_nonzero(found >= 0)
        assert (np.diff(found[:n]) > 0).all() and (found[n:] == -1).all()


@pytest.mark.parametrize("values", [3, 1000, None], ids=["ties", "some ties", "no ties"])
def test_long_rows(values):
    rng = np.random.default_rng(0)
    n, k = choose((1500, 200), (100_000, 2048))
    row = rng.integers(0, values, n) if values else rng.permutation(n) - n // 2
    check(row, k)
    check(row, n - 1)


def sampled(of_sample, others, n=5000):
    """A row whose sampled values differ from the others.

    The threshold is taken from every sixteenth value.
    """
    return np.where(np.arange(n) % SAMPLE_STRIDE == 0, of_sample, others)


NORMAL = np.random.default_rng(4).standard_normal(5000)
LONG_ROWS = {
    "normal": NORMAL, "a length that vectors do not divide": NORMAL[:4999], "descending": -np.arange(5000.0),
    "the sample is too high": sampled(NORMAL + 100, NORMAL), "too low": sampled(NORMAL - 100, NORMAL),
    "the sample is -inf": sampled(-INF, NORMAL), "the sample is NaN": sampled(NAN, NORMAL),
    "all but the sample is -inf": sampled(NORMAL, -INF),
    "all but a few are -inf": np.where(np.arange(5000) % 700 == 3, NORMAL, -INF), "all equal": np.full(5000, -3.0),
    "ties at the threshold": np.round(NORMAL * 2), "signed zeros": np.where(NORMAL > 0, 0.0, -0.0),
    "denormals": np.round(NORMAL * 50) * 1e-45,
    "negative and near": -1 - np.abs(NORMAL) * 1e-6,
    "+inf among them": np.where(np.arange(5000) % 97 == 5, INF, NORMAL), "NaN": np.full(5000, NAN),
}


@pytest.mark.parametrize("k", [1, 16, 512, SAMPLED_SIZE // SAMPLED_RATIO, 5000 // SAMPLED_RATIO, 5000 // SAMPLED_RATIO + 1])
@pytest.mark.parametrize("name", LONG_ROWS)
def test_rows_that_are_sampled(name, k):
    check(LONG_ROWS[name], k)


@pytest.mark.parametrize("n", [SAMPLED_SIZE - 1, SAMPLED_SIZE, SAMPLED_SIZE + 1, SAMPLED_SIZE + 15])
def test_lengths_around_a_sample(n):
    check(NORMAL[:n], 100)
