"""Sampling: examples worked by hand, known distributions, invariants."""
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydsa.errors import PydsaError
from pydsa.sampling import Sampler, Sampling, log_probabilities, top_k

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}      # options that leave the distribution unchanged
N_DRAWS = 4000


def logits_of(*probabilities):
    return np.log(np.array(probabilities)).astype(np.float32)


def draws(logits, history=(), n=N_DRAWS, **options):
    """The share of each token in n draws."""
    sampler = Sampler(Sampling(**{**OFF, "seed": 7, **options}))
    ids = [sampler.pick(logits, history) for _ in range(n)]
    return np.bincount(ids, minlength=len(logits)) / n


def possible(logits, history=(), **options):
    """The tokens that are drawn at all."""
    return np.flatnonzero(draws(logits, history, **options)).tolist()


def assert_close(observed, expected):
    """Within five standard deviations of a binomial distribution."""
    expected = np.array(expected)
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected * (1 - expected) / N_DRAWS)).all()


# Known distributions

def test_draws_follow_the_softmax():
    assert_close(draws(logits_of(0.5, 0.3, 0.15, 0.05)), [0.5, 0.3, 0.15, 0.05])


def test_order_and_offset_of_the_logits_do_not_matter():
    assert_close(draws(logits_of(0.05, 0.5, 0.15, 0.3) - 300), [0.05, 0.5, 0.15, 0.3])


@pytest.mark.parametrize("temperature, expected", [(0.5, [0.8, 0.2]), (2.0, [2 - math.sqrt(2), math.sqrt(2) - 1])])
def test_temperature_divides_the_logits(temperature, expected):
    assert_close(draws(logits_of(2 / 3, 1 / 3), temperature=temperature), expected)


def test_a_tiny_temperature_is_greedy_in_effect():
    assert possible(logits_of(0.3, 0.4, 0.3), temperature=1e-300) == [1]


def test_temperature_comes_last():
    # Of 0.6, 0.3, 0.1 the first two reach top_p 0.85, and 0.3 passes min_p 0.5; a temperature of 9 would change both.
    logits = logits_of(0.1, 0.6, 0.3)
    assert possible(logits, top_p=0.85, temperature=9.0) == [1, 2]
    assert possible(logits, min_p=0.5, temperature=9.0) == [1, 2]


@pytest.mark.parametrize("top_k, expected", [(0, [0, 1, 2, 3]), (1, [2]), (2, [1, 2]), (4, [0, 1, 2, 3]),
                                             (9, [0, 1, 2, 3])])
def test_top_k(top_k, expected):
    assert possible(logits_of(0.1, 0.3, 0.4, 0.2), top_k=top_k) == expected


def test_top_k_takes_the_first_of_equals():
    assert possible(logits_of(0.1, 0.2, 0.2, 0.2, 0.3), top_k=3) == [1, 2, 4]


# The first n of 0.5, 0.25, 0.125, 0.125 sum to 0.5, 0.75, 0.875, 1: exact in binary.
@pytest.mark.parametrize("top_p, expected", [(0.0, [2]), (0.49, [2]), (0.51, [0, 2]), (0.74, [0, 2]), (0.76, [0, 1, 2]),
                                             (0.99, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p(top_p, expected):
    assert possible(logits_of(0.25, 0.125, 0.5, 0.125), top_p=top_p) == expected


def test_top_p_counts_what_top_k_left():
    # Of 0.4, 0.3, 0.2, 0.1 top_k keeps 4/7 and 3/7: the first has 0.56 of what is left, but not of the whole.
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert possible(logits, top_p=0.56) == [0, 1]
    assert possible(logits, top_k=2, top_p=0.56) == [0]
    assert_close(draws(logits, top_k=2), [4 / 7, 3 / 7, 0, 0])


@pytest.mark.parametrize("min_p, expected", [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.26, [0, 1, 2]),
                                             (0.51, [1, 2]), (0.76, [2]), (1.0, [2])])
def test_min_p_is_relative_to_the_likeliest(min_p, expected):
    assert possible(logits_of(0.2, 0.3, 0.4, 0.1), min_p=min_p) == expected


# Penalties

@pytest.mark.parametrize("history, options, expected", [
    ([0, 1], {"repeat_penalty": 2.0}, [1.0, -6.0, 1.0, 0.0]),           # positive logits are divided, others multiplied
    ([3, 3], {"repeat_penalty": 2.0}, [2.0, -3.0, 1.0, 0.0]),           # once, however often the token was seen
    ([0, 2, 0, 0], {"frequency_penalty": 0.5}, [0.5, -3.0, 0.5, 0.0]),
    ([0, 2, 0, 0], {"presence_penalty": 0.5}, [1.5, -3.0, 0.5, 0.0]),
    ([1], {"presence_penalty": -1.0}, [2.0, -2.0, 1.0, 0.0]),
    ([0, 1, 1], {"repeat_penalty": 4.0, "frequency_penalty": 0.25, "presence_penalty": 1.0}, [-0.75, -13.5, 1.0, 0.0]),
    ([0, 1, 2], {"presence_penalty": 1.0, "repeat_last_n": 2}, [2.0, -4.0, 0.0, 0.0]),
    ([0, 1, 2], {"presence_penalty": 1.0, "repeat_last_n": 0}, [2.0, -3.0, 1.0, 0.0]),
    ([0] + [1] * 99, {"presence_penalty": 1.0}, [2.0, -4.0, 1.0, 0.0]),         # 64 by default
    ([0] + [1] * 99, {"presence_penalty": 1.0, "repeat_last_n": -1}, [1.0, -4.0, 1.0, 0.0]),
    ([], {"repeat_penalty": 2.0}, [2.0, -3.0, 1.0, 0.0])])
def test_penalties(history, options, expected):
    expected = np.exp(expected) / np.exp(expected).sum()
    logits = np.array([2.0, -3.0, 1.0, 0.0], np.float32)
    assert_close(draws(logits, history, **options), expected)
    assert_close(draws(logits, np.array(history, np.int64), **options), expected)
    assert logits.tolist() == [2.0, -3.0, 1.0, 0.0]


def test_penalties_come_before_all_else():
    logits = logits_of(0.1, 0.5, 0.4)
    assert Sampler(Sampling(temperature=0, presence_penalty=1.0)).pick(logits, [1]) == 2
    assert possible(logits, [1], top_k=1, presence_penalty=1.0) == [2]


@pytest.mark.parametrize("history, expected", [([-1], "ids from -1 to -1"),
                                               ([0, 4], "ids from 0 to 4, expected 0 to 3")])
def test_history_outside_of_the_vocabulary(history, expected):
    with pytest.raises(PydsaError, match=expected):
        Sampler(Sampling(repeat_penalty=2.0)).pick(np.zeros(4, np.float32), history)


# Biases

def test_biases_come_first():
    logits = np.array([2.0, -3.0, 1.0, 0.0], np.float32)
    expected = np.exp([2.0, -1.0, 0.5, 0.0])
    assert_close(draws(logits, logit_bias={1: 2, 2: -0.5}), expected / expected.sum())
    assert logits.tolist() == [2.0, -3.0, 1.0, 0.0]
    assert Sampler(Sampling(temperature=0, repeat_penalty=4.0, logit_bias={np.int64(2): 3.0})).pick(logits, [2]) == 0      # (1 + 3) / 4 < 2
    assert possible(logits, top_k=1, logit_bias={3: 9}) == [3]


@pytest.mark.parametrize("ban", [False, -math.inf])
def test_banned_tokens_are_not_picked(ban):
    logits = logits_of(0.1, 0.5, 0.4)
    assert Sampler(Sampling(temperature=0, logit_bias={1: ban})).pick(logits) == 2
    assert possible(logits, logit_bias={1: ban, 2: ban}) == [0]
    with pytest.raises(PydsaError, match="logit_bias bans every token"):
        Sampler(Sampling(logit_bias={0: ban, 1: ban, 2: ban})).pick(logits)
    with pytest.raises(PydsaError, match="the greatest of the logits is nan"):
        Sampler(Sampling(logit_bias={1: ban})).pick(np.array([1, np.nan, 1], np.float32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-2.0, 0.0, 0.1, 1.0, 3.0, np.nan, np.inf]), min_size=4, max_size=4),
       st.dictionaries(st.integers(0, 3), st.sampled_from([-np.inf, -3.0, -2.0, 0.9, 1.0, 2.0]), min_size=1))
def test_greedy_with_biases_is_the_argmax_of_the_sums(values, biases):
    logits = np.array(values, np.float32)
    expected = logits.astype(np.float64)
    if np.isfinite(values).all():
        for token, bias in biases.items():
            expected[token] += bias
    sampler = Sampler(Sampling(temperature=0, logit_bias=biases))
    if np.isfinite(expected.max()):
        assert sampler.pick(logits) == expected.argmax()
    else:
        with pytest.raises(PydsaError, match="greatest of the logits|bans every token"):
            sampler.pick(logits)


def test_changed_logits_take_no_new_memory():
    """Fresh memory would cost a page fault every 4 KiB, for each token."""
    logits, allowed = np.zeros(1 << 16, np.float32), np.ones(1 << 16, bool)
    sampler = Sampler(Sampling(temperature=0, logit_bias={7: 2.0}, presence_penalty=3.0))
    assert sampler.pick(logits, [9], allowed) == 7
    tracemalloc.start()
    try:
        assert sampler.pick(logits, [7], allowed) == 0
        assert tracemalloc.get_traced_memory()[1] < logits.nbytes / 2
    finally:
        tracemalloc.stop()
    assert not logits.any()


def test_a_device_leaves_biased_sampling_to_the_host():
    assert Sampler(Sampling(logit_bias={1: 2.0})).settings(1024) is None
    assert Sampler(Sampling(logit_bias={})).settings(1024) is not None


def test_a_bias_outside_of_the_vocabulary():
    with pytest.raises(PydsaError, match="logit_bias has the token 4, expected ids from 0 to 3"):
        Sampler(Sampling(logit_bias={4: 1})).pick(np.zeros(4, np.float32))


# Allowed tokens

@pytest.mark.parametrize("temperature", [0, 1.0])
def test_only_allowed_tokens_are_picked(temperature):
    logits, allowed = logits_of(0.1, 0.5, 0.3, 0.1), np.array([True, False, True, False])
    sampler = Sampler(Sampling(**OFF | {"temperature": temperature}, logit_bias={1: 9.0}, presence_penalty=1.0, seed=3))
    assert {sampler.pick(logits, [2], allowed) for _ in range(100)} <= {0, 2}
    assert Sampler(Sampling(temperature=0)).pick(logits, [], ~allowed) == 1
    assert_close(np.bincount([sampler.pick(logits, [], allowed) for _ in range(N_DRAWS)], minlength=4) / N_DRAWS,
                 [0.25, 0, 0.75, 0] if temperature else [0, 0, 1, 0])


def test_nothing_is_allowed():
    with pytest.raises(PydsaError, match="the constraint allows no token, expected at least one"):
        Sampler().pick(np.zeros(3, np.float32), (), np.zeros(3, bool))
    with pytest.raises(PydsaError, match="logit_bias bans every token"):
        Sampler(Sampling(logit_bias={1: False})).pick(np.zeros(3, np.float32), (), np.array([False, True, False]))
    with pytest.raises(PydsaError, match="the greatest of the logits is nan"):     # a ban does not hide damage
        Sampler().pick(np.array([1, np.nan], np.float32), (), np.array([True, False]))


# Log-probabilities

def test_log_probabilities_are_those_of_the_raw_logits():
    logits = (logits_of(0.5, 0.125, 0.25, 0.125) + 200).astype(np.float32)
    logprob, likeliest = log_probabilities(logits, 1, 3)
    assert logprob == pytest.approx(math.log(0.125), abs=1e-5) and [i for i, _ in likeliest] == [0, 2, 1]
    assert [p for _, p in likeliest] == pytest.approx(np.log([0.5, 0.25, 0.125]), abs=1e-5)
    assert log_probabilities(logits, 0) == (pytest.approx(math.log(0.5), abs=1e-5), [])
    assert len(log_probabilities(logits, 0, 9)[1]) == 4
    assert sum(math.exp(p) for _, p in log_probabilities(np.random.default_rng(0).normal(size=500).astype(np.float32), 0, 500)[1]) == \
        pytest.approx(1, abs=1e-14)


# Greedy

def test_greedy_takes_the_first_of_the_likeliest():
    sampler = Sampler(Sampling(temperature=0))
    assert sampler.pick(np.array([0, 3, 1, 3], np.float32), []) == 1
    assert sampler.pick(np.array([-np.inf, -5], np.float32), []) == 1
    assert isinstance(sampler.pick(np.zeros(3, np.float32), []), int)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits(bad, temperature):
    with pytest.raises(PydsaError, match=f"the greatest of the logits is {bad}, expected a finite number"):
        Sampler(Sampling(temperature=temperature)).pick(np.array([1, bad, 2], np.float32), [])


def test_nothing_left_to_pick():
    with pytest.raises(PydsaError, match="the greatest of the logits is -inf"):
        Sampler(Sampling()).pick(np.full(3, -np.inf, np.float32), [])


# Invariants

def plain_top_k(logits, k):
    """The k greatest by sorting all."""
    ids = np.argsort(-logits, kind="stable")[:k]
    return ids[logits[ids] > -math.inf]


@pytest.mark.parametrize("n", [9, 1000, 5000, 33_333])
@pytest.mark.parametrize("k", [1, 7, 40, 900])
def test_the_fast_top_k_is_the_plain_one(n, k):
    random = np.random.default_rng(n + k)
    normal = (random.normal(size=n) * 3).astype(np.float32)
    few = np.where(random.random(n) < 0.003, normal, -np.inf).astype(np.float32)
    few[0] = 1
    for logits in (normal, normal.astype(np.float64), np.round(normal), np.zeros(n, np.float32), np.sort(normal), few):
        found = top_k(logits, k)
        assert found[logits[found] > -math.inf].tolist() == plain_top_k(logits, k).tolist()


LOGITS = st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=1, max_size=40).filter(
    lambda values: max(values) > -math.inf)


@settings(deadline=None)
@given(values=LOGITS, top_k=st.integers(0, 50), top_p=st.floats(0, 1), min_p=st.floats(0, 1),
       temperature=st.floats(0, 5), seed=st.integers(0, 99))
def test_the_picked_passes_every_step(values, top_k, top_p, min_p, temperature, seed):
    logits = np.array(values, np.float32)
    picked = Sampler(Sampling(temperature, top_k, top_p, min_p, seed=seed)).pick(logits)
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    greater = np.append(np.flatnonzero(logits > logits[picked]), np.flatnonzero(logits[:picked] == logits[picked]))
    assert probabilities[picked] > 0
    assert top_k == 0 or len(greater) < top_k
    assert probabilities[picked] >= min_p * (1 - 1e-9)
    kept = np.sort(probabilities)[::-1][:top_k or None].sum()
    assert len(greater) == 0 or probabilities[greater].sum() / kept < top_p + 1e-9
    assert temperature > 0 or len(greater) == 0


@settings(deadline=None)
@given(values=LOGITS, options=st.sampled_from([{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0}]))
def test_each_option_at_its_end_is_greedy(values, options):
    logits = np.array(values, np.float32)
    picked = Sampler(Sampling(**{**OFF, **options})).pick(logits)
    assert logits[picked] == logits.max()


def test_a_seed_repeats_the_draws():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def ids(seed):
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.pick(logits, []) for _ in range(30)]
    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    assert ids(None) != ids(None)


def test_the_defaults():
    assert Sampler().sampling == Sampling() == Sampling(0.8, 40, 0.95, 0.05, 1.0, 64, 0.0, 0.0, None)


# Allowed values

@pytest.mark.parametrize("options, expected", [
    ({"temperature": -0.1}, "temperature is -0.1, expected a number from 0"),
    ({"temperature": math.nan}, "temperature is nan, expected a number from 0"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
    ({"temperature": None}, "temperature is None"),
    ({"temperature": True}, "temperature is True"),
    ({"top_k": -2}, "top_k is -2, expected an integer from -1"),
    ({"top_k": 1.5}, "top_k is 1.5, expected an integer"),
    ({"top_p": 1.1}, "top_p is 1.1, expected a number from 0 to 1"),
    ({"top_p": -0.1}, "top_p is -0.1"),
    ({"min_p": 2}, "min_p is 2, expected a number from 0 to 1"),
    ({"repeat_penalty": 0}, "repeat_penalty is 0, expected a number above 0"),
    ({"repeat_penalty": -1.0}, "repeat_penalty is -1.0"),
    ({"repeat_last_n": -2}, "repeat_last_n is -2, expected an integer from -1"),
    ({"frequency_penalty": math.inf}, "frequency_penalty is inf, expected a number$"),
    ({"presence_penalty": math.nan}, "presence_penalty is nan, expected a number$"),
    ({"logit_bias": [1]}, "logit_bias is \\[1\\], expected a dict of token ids and numbers"),
    ({"logit_bias": {"a": 1}}, "logit_bias has the token 'a', expected a token id"),
    ({"logit_bias": {-1: 1}}, "logit_bias has the token -1"),
    ({"logit_bias": {True: 1}}, "logit_bias has the token True"),
    ({"logit_bias": {1: True}}, "logit_bias of token 1 is True, expected a number, or -inf or False"),
    ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
    ({"logit_bias": {1: "x"}}, "logit_bias of token 1 is 'x'"),
    ({"logit_bias": {2**31: 1}}, "logit_bias has the token 2147483648, expected a token id"),
    ({"logit_bias": {1: 10**400}}, "logit_bias of token 1 is 10000"),
    ({"logit_bias": {1: -10**400}}, "logit_bias of token 1 is -1000"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"top_k": 10**400}, "top_k is 1000"),
    ({"seed": -1}, "seed is -1, expected an integer from 0"),
    ({"seed": 1.0}, "seed is 1.0, expected an integer")])
def test_illegal_values(options, expected):
    with pytest.raises(PydsaError, match=f"^{expected}"):
        Sampling(**options)


def test_legal_values_at_the_ends():
    Sampling(temperature=0, top_k=0, top_p=0, min_p=0, repeat_penalty=1e-9, repeat_last_n=-1, seed=0)
    Sampling(temperature=np.float32(2), top_k=np.int64(9), top_p=1, min_p=1, frequency_penalty=-2, presence_penalty=-2)
    with pytest.raises(AttributeError):
        Sampling().top_k = 3
