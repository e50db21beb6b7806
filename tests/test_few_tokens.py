"""Products for a few tokens: a token's are the same, bit for bit, whichever others there are in the step.

Weights with tiles have two forms of products, each of which is the same: for up to four tokens, and for more.
"""
import numpy as np
import pytest
from helpers import normal, rng, tensor

from pydsa.backends import cpu
from pydsa.backends.cpu.blocks.dots import DOT_TOKENS
from pydsa.backends.cpu.int16.tiles import TILES_HERE
from pydsa.backends.cpu.jit import FIRST_LEVEL_CACHE
from pydsa.backends.cpu.linear import BLOCK_TOKENS, GEMV_TOKENS, by_blocks, dot_tokens, gemv_tokens_together
from pydsa.backends.cpu.team import threads
from pydsa.quants import SUPPORTED

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = [("Q4_K", "Q6_K", "Q5_0", 256, 96), ("IQ2_XXS", "IQ2_XXS", "Q8_0", 256, 32), ("F32", "F16", "BF16", 29, 37)]
COUNTS = sorted({*range(1, GEMV_TOKENS + 1, 3), *range(1, 2 * DOT_TOKENS), GEMV_TOKENS, GEMV_TOKENS + 1})


def run(op, shape, *args):
    """What an op writes, as integers: NaN for what it leaves."""
    out = np.full(shape, np.nan, np.float32)
    getattr(cpu, op)(out, *args)
    return out.view(np.int32)


def weight(kind, n_tokens, *shape):
    """A weight for steps of so many tokens; beyond its limit one without."""
    w = cpu.weight(tensor(kind, *shape))
    return w if by_blocks(w, n_tokens) else cpu.reproducible(w)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_products(kind):
    """For every remainder of four, up to the limit.

    And beyond it, for a weight that has none.
    """
    x = normal(GEMV_TOKENS + 1, 512)
    alone = np.concatenate([run("linear", (1, 37), weight(kind, 1, 37, 512), x[t:t + 1]) for t in range(len(x))])
    for n in COUNTS:
        assert np.array_equal(run("linear", (n, 37), weight(kind, n, 37, 512), x[:n]), alone[:n]), n


def test_tokens_that_do_not_fit_into_a_cache():
    n = 2 * gemv_tokens_together(512) + 21
    x, w = normal(n, 512), weight("Q4_K", n, 37, 512)
    assert np.array_equal(run("linear", (n, 37), w, x)[-5:], run("linear", (5, 37), w, x[-5:]))


def test_long_rows():
    """Whose activations, of eight tokens, do not fit into a first-level cache."""
    n_in = FIRST_LEVEL_CACHE // 8 // 256 * 256
    x, w = normal(8, n_in), weight("Q4_K", 8, 5, n_in)
    assert dot_tokens(w, 256) == DOT_TOKENS and dot_tokens(w, n_in) == 4
    assert np.array_equal(run("linear", (8, 5), w, x)[-1:], run("linear", (1, 5), w, x[-1:]))


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K", "F16"])
def test_heads(kind):
    x = normal(GEMV_TOKENS + 1, 3, 256)
    alone = np.concatenate([run("head_linear", (1, 3, 5), weight(kind, 1, 3, 5, 256), x[t:t + 1]) for t in range(len(x))])
    for n in COUNTS:
        assert np.array_equal(run("head_linear", (n, 3, 5), weight(kind, n, 3, 5, 256), x[:n]), alone[:n]), n


def test_heads_are_divided_among_threads():
    """All in one task, or some: four, three, two."""
    x, w, found = normal(3, 7, 256), cpu.weight(tensor("Q4_K", 7, 40, 256)), []
    for n in (1, 2, 3, 8):
        threads.set_threads(n)
        found.append(run("head_linear", (3, 7, 40), w, x))
    assert np.isfinite(found[0].view(np.float32)).all() and all(np.array_equal(other, found[0]) for other in found)


@pytest.mark.skipif(not TILES_HERE, reason="for CPUs with AVX-512 VNNI")
@pytest.mark.parametrize("kind, n_in, n_out", [("Q4_K", 512, 70), ("Q6_K", 512, 33), ("Q5_0", 384, 64), ("Q5_0", 288, 32)])
def test_tiles(kind, n_in, n_out):
    """Beyond a few tokens a product is that of many (test_words.py)."""
    x, w = normal(GEMV_TOKENS + 1, 2, n_in), cpu.weight(tensor(kind, 2, n_out, n_in))
    many = run("head_linear", (len(x), 2, n_out), w._replace(multiply_tiles=0), x)
    for n in (BLOCK_TOKENS + 1, 8, 9, GEMV_TOKENS):
        assert not by_blocks(w, n) and np.array_equal(run("head_linear", (n, 2, n_out), w, x[:n]), many[:n]), n


@pytest.mark.parametrize("kinds", EXPERTS, ids=lambda kinds: kinds[0])
def test_experts(kinds):
    """Some experts have one token and some have many."""
    *kinds, n_in, n_ff = kinds
    n_most, shapes = GEMV_TOKENS + 1, [(5, n_ff, n_in), (5, n_ff, n_in), (5, n_in, n_ff)]
    x, hidden, weights = normal(n_most, n_in), normal(n_most, 2, n_ff), normal(n_most, 2)
    ids = np.array([rng(t).permutation(5)[:2] if t % 2 else [3, 1] for t in range(n_most)], np.int32)

    def all_three(first, n):
        gate, up, down = (weight(kind, n, *shape) for kind, shape in zip(kinds, shapes))
        part, some = slice(first, first + n), ids[first:first + n]
        return (run("moe_gate_up", (n, 2, n_ff), x[part], some, gate, up), run("moe_linear", (n, 2, n_ff), x[part], some, gate),
                run("moe_down", (n, n_in), hidden[part], some, weights[part], down))

    alone = [np.concatenate(parts) for parts in zip(*[all_three(t, 1) for t in range(n_most)])]
    for n in COUNTS:
        for together, expected in zip(all_three(0, n), alone):
            assert np.array_equal(together, expected[:n]), n
