"""Every op against the reference, at awkward sizes.

get_rows and cache_write are in test_quants.py, top_k in test_top_k.py.
"""
import math

import numpy as np
import pytest
from helpers import (DEVICE, Rows, choose, close, compare, integers, kernels, last_positions, normal, rng, run, same_for_all_threads,
                     tensor)

from pydsa.backends import reference
from pydsa.backends.cpu import jit
from pydsa.backends.cpu.vectors.scalars import exp
from pydsa.quants import CACHE_TYPES, SUPPORTED

pytestmark = pytest.mark.usefixtures("one_thread")
N_TOKENS, N_HEADS = choose(((1, 3), (1, 3)), ((1, 2, 7, 33), (1, 3, 4, 16)))


def inside(x, before=5, after=3):
    """x as columns of wider rows, as Value.slice makes them.

    The columns around are NaN.
    """
    wide = np.full((*x.shape[:-1], before + x.shape[-1] + after), np.nan, x.dtype)
    view = wide[..., before:before + x.shape[-1]]
    view[...] = x
    return view


def untouched_around(view):
    return np.isnan(view.base).sum() == view.base.size - view.size


@pytest.mark.parametrize("n", [1, 2, 13, 31, 576])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_rms_norm(n_tokens, n):
    x, w = normal(n_tokens, n), normal(n)
    found = compare("rms_norm", x.shape, x, w, 1e-6)
    view = inside(x)
    kernels.rms_norm(view, view, w, 1e-6)       # in place, as kv_cmpr
    assert close(view, found) and untouched_around(view)
    compare("rms_norm", x.shape, x * np.float32(1e-6), w, 1e-2)      # eps dominates
    compare("rms_norm", x.shape, np.zeros_like(x), w, 1e-6)


@pytest.mark.parametrize("n", [2, 13, 31, 128])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_layer_norm(n_tokens, n):
    """The mean is subtracted and the bias added.

    Neither an RMS norm nor a layer norm without bias gives the same.
    """
    x, w, b = normal(n_tokens, n) + 3, normal(n), normal(n) + 1
    found = compare("layer_norm", x.shape, x, w, b, 1e-6)
    assert np.allclose(((found - b) / w).mean(axis=1), 0, atol=1e-4)
    assert not np.allclose(found, run(kernels, "rms_norm", [x.shape], x, w, 1e-6) + b, atol=0.1)
    assert not np.allclose(found, run(kernels, "layer_norm", [x.shape], x, w, np.zeros_like(b), 1e-6), atol=0.1)
    compare("layer_norm", x.shape, np.full_like(x, 4), w, b, 1e-6)


@pytest.mark.parametrize("op", ["add", "silu_mul"])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_elementwise(n_tokens, op):
    for n in (1, 17, 96, 331):
        compare(op, (n_tokens, n), normal(n_tokens, n), normal(n, n_tokens).T.copy())


@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_scales(n_tokens):
    """One factor, and one for each expert; also of a slice, in place."""
    x, ids, factors = normal(n_tokens, 3, 33), expert_ids("random", n_tokens, 3, 5), normal(5)
    compare("scale", x.shape, x, -1.7)
    compare("expert_scale", x.shape, x, ids, factors)
    whole, part = normal(n_tokens, 3, 40), normal(n_tokens, 3, 40)[..., :33].astype(np.float64)
    for op, args, expected in (("scale", (0.3,), 0.3), ("expert_scale", (ids, factors), factors[ids][..., None])):
        met = whole.copy()
        getattr(kernels, op)(met[..., :33], met[..., :33], *args)
        assert close(met[..., :33], part * expected) and np.array_equal(met[..., 33:], whole[..., 33:])


def test_silu_at_extremes():
    gate = np.repeat(np.float32([-3e38, -1e4, -100, -89, -88.5, -88, -87, -1, -0.0, 0, 1, 87, 88, 88.5, 89, 100, 1e4]), 16)[None]
    found = compare("silu_mul", gate.shape, gate, np.ones_like(gate))
    assert np.isfinite(found).all() and (found[gate < -100] == 0).all()


@jit.kernel
def exps(out, x):
    for i in range(x.size):
        out[i] = exp(x[i])


def test_exp_of_float32():
    x = np.concatenate([np.linspace(-87, 88, 300_001), np.arange(-240, 250) * math.log(2) / 2]).clip(-87, 88).astype(np.float32)
    found, extremes = np.empty_like(x), np.empty(5, np.float32)
    exps(found, x)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    exps(extremes, np.float32([-np.inf, -1e30, 0, 88.7, np.inf]))
    assert (extremes[:2] < 1.3e-38).all() and (extremes[:2] >= 0).all() and extremes[2] == 1 and (extremes[3:] > 3e38).all()


WIDTHS = {"F32": choose((1, 37), (1, 5, 16, 17, 96, 257, 288, 523)), "F16": choose((31, 64), (1, 31, 96, 257, 288)),
          "BF16": choose((31, 64), (1, 31, 96, 257, 288)),
          **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"),
                          choose((32, 96), (32, 96, 288, 544))),
          "NVFP4": choose((64, 192), (64, 192, 448)), "Q1_0": choose((128, 384), (128, 384, 640))}
PRODUCTS = [(kind, n_in) for kind in SUPPORTED for n_in in WIDTHS.get(kind, choose((256,), (256, 768)))]


@pytest.mark.parametrize("kind, n_in", PRODUCTS)
def test_linear(kind, n_in):
    for n_tokens in N_TOKENS:
        # A single output could be a small difference of large products.
        for n_out in choose((17,), (1 if n_tokens > 2 else 2, 3, 4, 17, 37)):
            compare("linear", (n_tokens, n_out), tensor(kind, n_out, n_in), normal(n_tokens, n_in))


@pytest.mark.parametrize("kind, n_in", PRODUCTS)
def test_head_linear(kind, n_in):
    n_out = choose(5, 19)
    for n_tokens, n_head in zip(N_TOKENS, choose((1, 2), N_HEADS)):
        w, x = tensor(kind, n_head, n_out, n_in), normal(n_tokens, n_head, n_in)
        found = compare("head_linear", (n_tokens, n_head, n_out), w, x)
        view = inside(np.zeros_like(found))
        kernels.head_linear(view, kernels.weight(w), inside(x))
        assert np.array_equal(view, found) and untouched_around(view)


def expert_ids(choice, n_tokens, n_used, n_expert):
    """"one": the last experts for every token; else random ones.

    Random choices leave out the first expert.
    """
    if choice == "one":
        return np.tile(np.arange(n_expert - n_used, n_expert, dtype=np.int32), (n_tokens, 1))
    return np.array([1 + rng(t).permutation(n_expert - 1)[:n_used] for t in range(n_tokens)], np.int32)


@pytest.mark.parametrize("choice", ["one", "random"])
@pytest.mark.parametrize("n_used", choose([3], [1, 3]))
@pytest.mark.parametrize("kinds", choose(
    [("F32", "F16", "BF16", 29, 37), ("Q4_0", "Q8_0", "Q5_0", 32, 32)],
    [("F32", "F16", "BF16", 29, 37), ("Q4_K", "Q6_K", "Q5_0", 256, 96), ("Q2_K", "IQ4_XS", "IQ4_NL", 256, 96),
     ("Q3_K", "Q3_K", "MXFP4", 256, 96), ("Q8_0", "Q4_1", "F16", 288, 17)]))
def test_experts(kinds, n_used, choice):
    *kinds, n, n_ff = kinds
    gate, up, down = (tensor(kind, 5, *shape) for kind, shape in zip(kinds, [(n_ff, n), (n_ff, n), (n, n_ff)]))
    for n_tokens in N_TOKENS:
        ids = expert_ids(choice, n_tokens, n_used, 5)
        hidden = compare("moe_gate_up", (n_tokens, n_used, n_ff), normal(n_tokens, n), ids, gate, up)
        compare("moe_linear", (n_tokens, n_used, n_ff), normal(n_tokens, n), ids, gate)
        compare("moe_down", (n_tokens, n), hidden, ids, normal(n_tokens, n_used), down)


ROUTED = choose(2, 33)      # tokens
ROUTES = [  # gating, n_group, n_group_used, norm, scale
    (1, 1, 1, False, 1.0), (1, 1, 1, True, 2.5), (2, 1, 1, True, 2.5), (3, 1, 1, False, 1.0), (3, 4, 2, False, 16.0),
    (1, 4, 2, False, 16.0), (2, 8, 4, True, 2.5), (2, 4, 1, False, 1.0), (2, 24, 7, True, 1.0), (2, 2, 2, True, 1.0)]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("rule", ROUTES)
@pytest.mark.parametrize("logits", [normal(ROUTED, 24), integers(-1, 1, ROUTED, 24), np.zeros((2, 24), np.float32),
                                    1e4 * integers(-1, 1, ROUTED, 24)],
                         ids=["normal", "ties", "equal", "large"])
def test_moe_route(logits, rule):
    bias = integers(-2, 2, 24) / np.float32(8)
    for b in (np.zeros_like(bias), bias):
        shapes = [len(logits), 6], (len(logits), 6)
        found, expected = (run(backend, "moe_route", shapes, logits, b, *rule) for backend in (kernels, reference))
        assert all(map(close, found, expected))


@pytest.mark.parametrize("backend", [kernels, reference], ids=[DEVICE, "reference"])
def test_moe_route_by_hand(backend):
    """Routing worked by hand.

    The bias chooses but has no weight. Ties go to the first group and the first expert. A group's score is the sum of its two best experts.
    """
    logits = np.float32([[0, 0, 2, -9, 0, 0, 0, 0]])
    zero, bias = np.zeros(8, np.float32), np.float32([0, 0, 0, 0, 0, 0, 0, 9])
    cases = [(zero, 1, 1, [2, 0, 1]), (bias, 1, 1, [7, 2, 0]), (zero, 4, 2, [0, 1, 4]), (zero, 8, 3, [2, 0, 1]), (bias, 2, 1, [7, 4, 5])]
    for b, n_group, n_group_used, expected in cases:
        ids, weights = run(backend, "moe_route", [[1, 3], (1, 3)], logits, b, 2, n_group, n_group_used, False, 1.0)
        assert ids[0].tolist() == expected
        assert weights[0] == pytest.approx([1 / (1 + math.exp(-logits[0, e])) for e in expected])


def test_rope_table():
    freqs = 1e4 ** (-np.arange(0, 64, 2) / 64)
    found = compare("rope_table", (5, 2, 32), np.int64([0, 1, 4095, 163_839, 1_048_575]), freqs, 1.25)
    assert close(found[:, 0] ** 2 + found[:, 1] ** 2, np.full((5, 32), 1.25 ** 2))


@pytest.mark.parametrize("n_rot", [2, 6, 64])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("neox", [False, True], ids=["norm", "neox"])
def test_rope(neox, n_tokens, n_rot):
    """RoPE against complex numbers, into other rows, in place, on slices."""
    pairs = (2, n_rot // 2) if neox else (n_rot // 2, 2)
    angles = last_positions(n_tokens, 1000)[:, None] * 1e3 ** (-np.arange(0, n_rot, 2) / n_rot)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    for n_head in N_HEADS:
        x = normal(n_tokens, n_head, n_rot)
        a, b = np.moveaxis(x.reshape(n_tokens, n_head, *pairs), 2 if neox else 3, 0)
        rotated = (a + 1j * b) * np.exp(1j * angles)[:, None]
        expected = np.stack([rotated.real, rotated.imag], axis=2 if neox else 3).reshape(x.shape)
        assert close(compare("rope", x.shape, x, table, neox), expected)
        whole, part, target = x.copy(), inside(x), inside(np.zeros_like(x), 0, 7)
        kernels.rope(whole, whole, table, neox)
        kernels.rope(part, part, table, neox)
        kernels.rope(target, inside(x), table, neox)
        for found in (whole, part, target):
            assert close(found, expected)
        assert untouched_around(part) and untouched_around(target)


def test_rope_styles_differ():
    x, table = normal(3, 2, 8), normal(3, 2, 4)
    norm, neox = (run(kernels, "rope", [x.shape], x, table, style) for style in (False, True))
    assert not np.allclose(norm, neox, atol=0.1)
    order = np.arange(8).reshape(2, 4).T.reshape(-1)        # neox is norm with the two halves interleaved
    assert close(run(kernels, "rope", [x.shape], x[..., order].copy(), table, False), neox[..., order])


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_hadamard(width):
    """H is Sylvester's matrix over sqrt(width), and H H = I.

    Dot products of rotated rows are those of the rows.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    for n_tokens, n_head in zip(N_TOKENS, N_HEADS):
        x = normal(n_tokens, n_head, width)
        found = compare("hadamard", x.shape, x)
        assert close(found, x @ matrix / math.sqrt(width))
        assert close(np.einsum("thi,shi->ts", found, found), np.einsum("thi,shi->ts", x, x), 1e-11)
        kernels.hadamard(found, found)
        assert close(found, x)


def indexer_case(n_tokens, n_kv, n_head, kv_type="f32"):
    """q, w, keys, positions and scale of an indexer, in integers.

    Dots and weights have both signs. Sums are exact, with many ties.
    """
    return (integers(-3, 3, n_tokens, n_head, 16), integers(-2, 2, n_tokens, n_head), Rows(integers(-3, 3, n_kv, 16), kv_type),
            last_positions(n_tokens, n_kv), 1 / 16)


def test_scores_by_hand():
    """One key and two heads, one of which has a negative dot product.

    The second token has a negative weight.
    """
    q, keys = np.float32([[[1, 2], [-1, 0]], [[1, 2], [1, 0]]]), Rows(np.float32([[3, 1], [-1, 1]]))
    w = np.float32([[10, 100], [10, -100]])
    for backend in (kernels, reference):
        scores = run(backend, "indexer_scores", [(2, 4)], q, w, keys, np.arange(2), 0.5)
        assert scores.tolist() == [[25, -np.inf, -np.inf, -np.inf], [-125, 5, -np.inf, -np.inf]]


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
@pytest.mark.parametrize("n_tokens, n_kv", choose([(1, 1), (1, 13), (3, 17)],
                                                  [(1, 1), (1, 63), (1, 64), (2, 65), (7, 130), (33, 33), (33, 200)]))
def test_indexer_scores(n_tokens, n_kv, kv_type):
    positions = last_positions(n_tokens, n_kv)
    for n_head, width in choose(((1, 1), (3, 13), (6, 32)), ((1, 1), (3, 13), (4, 128), (16, 32))):
        q, w, keys = normal(n_tokens, n_head, width), normal(n_tokens, n_head), Rows(normal(n_kv, width), kv_type)
        norms = (np.linalg.norm(q, axis=-1) * abs(w)).sum(axis=1)
        size = 0.125 * norms[:, None] * np.pad(np.linalg.norm(keys.values, axis=-1), (0, 3))
        # int16 queries are rounded beside their own size, of which little is left where products cancel
        compare("indexer_scores", (n_tokens, n_kv + 3), q, w, keys, positions, 0.125, size=size if kv_type == "i8" else None)


@pytest.mark.parametrize("kv_type", [name for name, kind in CACHE_TYPES.items() if not kind.scaled])
@pytest.mark.parametrize("n_tokens, k", choose([(1, 8), (2, 1), (3, 7)], [(1, 8), (1, 70), (33, 40), (33, 64), (2, 1)]))
def test_indexer_select(n_tokens, k, kv_type):
    """indexer_select equals top_k of indexer_scores.

    Contexts end where the selection begins to matter, and far beyond.
    """
    for n_kv in {max(n, n_tokens) for n in choose((k, k + 1, 3 * k), (k - 1, k, k + 1, 2 * k, 5 * k, 300))}:
        for n_head in choose((3,), (1, 3, 16)):
            case = indexer_case(n_tokens, n_kv, n_head, kv_type)
            found, expected = (run(backend, "indexer_select", [[n_tokens, k]], *case) for backend in (kernels, reference))
            scores = run(kernels, "indexer_scores", [(n_tokens, n_kv)], *case)
            assert np.array_equal(found, expected) and np.array_equal(found, run(kernels, "top_k", [[n_tokens, k]], scores))
            assert (found <= case[3][:, None]).all()
            assert ((found >= 0).sum(axis=1) == np.minimum(case[3] + 1, k)).all()


def test_selection_needs_relu_and_the_sum_of_heads():
    n = choose(2, 7)
    q, w, keys, positions, scale = indexer_case(n, 200, 4)
    found = run(kernels, "indexer_select", [[n, 20]], q, w, keys, positions, scale)
    dots = np.einsum("thd,sd->ths", q, keys.values)
    relu = w[..., None] * np.maximum(dots, 0)
    wrong = {"no relu": (w[..., None] * dots).sum(axis=1), "relu of the sum": np.maximum((w[..., None] * dots).sum(axis=1), 0),
             "best head": relu.max(axis=1), "no weights": np.maximum(dots, 0).sum(axis=1)}
    for t, position in enumerate(positions):
        def best(scores):
            return sorted(np.argsort(-scores[t, :position + 1], kind="stable")[:20].tolist())
        assert found[t].tolist() == best(relu.sum(axis=1))
        assert all(found[t].tolist() != best(scores) for scores in wrong.values())


def test_scatter_mask():
    indices = np.int32([[0, 2, 5], [1, 6, 7], [3, -1, -1], [-1, -1, -1], [8, 9, -1]])
    found = compare("scatter_mask", (5, 12), indices, np.int64([5, 6, 7, 8, 9]))
    assert [np.flatnonzero(row == 0).tolist() for row in found] == [[0, 2, 5], [1, 6], [3], [], [8, 9]]


def thread_cases():
    """Ops whose work is divided by the number of threads, but never a sum."""
    ids = expert_ids("random", 7, 2, 5)
    yield "linear", (7, 67), tensor("Q8_0", 67, 288), normal(7, 288)
    yield "linear", (1, 67), tensor("F16", 67, 97), normal(1, 97)
    for kind in SUPPORTED:      # tasks begin at other rows
        yield "linear", (1, 150), tensor(kind, 150, 512), normal(1, 512)
    yield "head_linear", (7, 3, 33), tensor("Q4_K", 3, 33, 256), normal(7, 3, 256)
    yield "moe_gate_up", (7, 2, 33), normal(7, 32), ids, tensor("Q4_0", 5, 33, 32), tensor("Q5_1", 5, 33, 32)
    yield "moe_down", (7, 33), normal(7, 2, 32), ids, normal(7, 2), tensor("Q5_0", 5, 33, 32)
    for n_tokens in (1, 3):
        args = normal(n_tokens, 4, 32), normal(n_tokens, 4), Rows(normal(500, 32)), last_positions(n_tokens, 500), 1.0
        yield "indexer_scores", (n_tokens, 500), *args
        yield "indexer_select", [n_tokens, 40], *args
        yield "top_k", [n_tokens, 40], normal(n_tokens, 500)
        n_kv = choose(600, 40_000)      # a row that is divided to select
        args = normal(n_tokens, 4, 32), normal(n_tokens, 4), Rows(normal(n_kv, 32), "i8"), last_positions(n_tokens, n_kv), 1.0
        yield "indexer_select", [n_tokens, 300], *args


@pytest.mark.parametrize("op, shape, args", [(op, shape, args) for op, shape, *args in thread_cases()])
def test_results_do_not_depend_on_threads(op, shape, args):
    assert same_for_all_threads(op, shape, *args)
