"""Prompts' attention to chosen rows in wgmma, beside float64.

One float16 a number is the precision (attend_chosen.py). The kernels run as PTX, on the emulated driver of a GPU of capability 9.0, and on
such a GPU.
"""
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DEVICE, IN_SIMULATOR, SIMULATED, Rows, integers, kernels, nmse, normal, reference, rng, run, tensor

if DEVICE != "cuda" or IN_SIMULATOR:
    pytest.skip("these are kernels of GPUs of capability 9.0", allow_module_level=True)

from pydsa.backends import cuda, gpus  # noqa: E402
from pydsa.backends.cuda import int8x2, modes, variants  # noqa: E402
from pydsa.backends.cuda.chosen import attend_chosen, attend_one, halved_heads  # noqa: E402
from pydsa.backends.cuda.linear import head_tiles  # noqa: E402
from pydsa.backends.cuda.runtime.current import current, selected  # noqa: E402
from pydsa.options import EXACT, FLOAT16  # noqa: E402
from pydsa.quants import CACHE_TYPES  # noqa: E402
from tools import time_kernels  # noqa: E402

BOUND = 2e-6        # of the NMSE of a head: float16 has 11 bits


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A GPU of capability 9.0, where two tokens are many; float16."""
    monkeypatch.setattr(attend_chosen, "MIN_BLOCKS", 2)
    monkeypatch.setattr(attend_one, "MOST_TOKENS", 1)
    if SIMULATED:
        monkeypatch.setattr(gpus.driver(), "capability", (9, 0), raising=False)
        monkeypatch.setitem(current().__dict__, "capability", (9, 0))
    elif current().capability != attend_chosen.CAPABILITY:
        pytest.skip("this GPU has another capability")
    with cuda.on(0, FLOAT16).selected():
        yield


def attended(q, rows, indices, scale):
    """What the kernels make of it, and float64."""
    shape = (*q.shape[:2], 512)
    found, expected = (run(backend, "sparse_attention", [shape], q, rows, indices, scale) for backend in (kernels, reference))
    assert attend_chosen.ATTEND[False]._loaded, "other kernels"
    return found, expected


def some_rows(n_kv, n, *valid):
    """For each token so many of n_kv rows, in any order, then places without."""
    indices = np.full((len(valid), n), -1, np.int32)
    for t, count in enumerate(valid):
        indices[t, :count] = rng(t, n_kv).permutation(n_kv)[:count]
    return indices


@pytest.mark.parametrize("storage, size, n_head", [("i16", 1e9, 70), ("bf16", 1e-9, 16), ("f32", 1e30, 16)])
def test_rows_of_all_caches(monkeypatch, storage, size, n_head):
    """Rows of different sizes in caches of very large and small numbers.

    Copies come early or late. Other types are in the tests that follow.
    """
    if SIMULATED:
        from tests.ptx import copies
        monkeypatch.setattr(copies, "EARLY", storage in ("i16", "bf16"))
    values = normal(100, 576) * np.exp2(integers(-1, 1, 100, 1)) * np.float32(size)
    q = normal(2, n_head, 576) * np.float32(1.5 / size)
    found, expected = attended(q, Rows(values, storage, 512), some_rows(100, 64 if n_head > 64 else 70, 64, 33), 0.02)
    assert nmse(found, expected).max() < BOUND


def test_tiles_that_are_full_of_holes():
    """Rows that are missing between others, and whole tiles of them.

    Weights are sharp, and one token has no row.
    """
    indices = some_rows(200, 195, 195, 100, 0)
    indices[0, 60:140], indices[1, :70] = -1, -1
    found, expected = attended(normal(3, 16, 576) * np.float32(4), Rows(normal(200, 576), "f16", 512), indices, 0.06)
    assert nmse(found[:2], expected[:2]).max() < 10 * BOUND and not found[2].any()


def test_all_rows():
    """Those up to a position, of which some are beside the end of a tile."""
    q, positions = normal(3, 16, 576), np.array([0, 63, 64])
    rows = Rows(np.concatenate([normal(65, 576), np.full((3, 576), np.nan, np.float32)]), "i8", 512)
    found, expected = (run(backend, "dense_attention", [(3, 16, 512)], q, rows, positions, 0.03) for backend in (kernels, reference))
    assert nmse(found, expected).max() < BOUND


def test_numbers_that_are_not_finite_stay_where_they_are():
    """A row of NaN spoils what chose it, a query its own head.

    Queries of zeros take the mean.
    """
    values, q = normal(90, 576), normal(2, 20, 576)
    values[5], values[6, 520], q[0, 3, 570], q[1, 4] = np.nan, np.inf, np.inf, 0
    indices = some_rows(90, 40, 40, 40)
    indices[0][indices[0] < 7], indices[1, 7] = -1, 5
    found, expected = attended(q, Rows(values, "f32", 512), indices, 0.03)
    others = np.arange(20) != 3
    assert nmse(found[0, others], expected[0, others]).max() < BOUND and np.isnan(found[0, 3]).all() and np.isnan(found[1]).all()
    indices[1] = np.abs(indices[1] - 7) + 7
    indices[1, 3] = -1
    found, expected = attended(q, Rows(values, "f32", 512), indices, 0.03)
    assert nmse(found[1], expected[1]).max() < BOUND and np.isfinite(found[1]).all()


def test_plain_form():
    """Its queries are parts of others, multiplied by k_b and not.

    v_b multiplies the result.
    """
    k_b, v_b = tensor("Q8_0", 16, 512, 128), tensor("Q8_0", 16, 128, 512)
    q, rows, indices = normal(2, 16, 192), Rows(normal(60, 576), "i16", 512), some_rows(50, 40, 40, 31)
    scale = float((reference.weight(k_b).std() ** 2 * 512 * 128 + 64) ** -0.5)
    args = q, rows, indices, k_b, v_b, np.array([50, 51]), scale
    found, expected = (run(backend, "mha_sparse_attention", [(2, 16, 128)], *args) for backend in (kernels, reference))
    assert nmse(found, expected).max() < BOUND


def unpacked(images, scales):
    """Queries [T, H, 576] of images (half_rows.py)."""
    n_tokens, n_head = scales.shape
    pieces = images.get().view(np.float16).reshape(n_tokens, -1, 9, 64, 8, 8)
    heads = np.arange(64)[:, None]
    numbers = pieces[:, :, :, heads, np.arange(8) ^ heads & 7].transpose(0, 1, 3, 2, 4, 5).reshape(n_tokens, -1, 576)
    assert not numbers[:, n_head:].any()
    return numbers[:, :n_head] * scales.get()[..., None].astype(np.float64)


@pytest.mark.parametrize("n_nope, n_head, n_tokens, kind", [(128, 2, 70, "Q8_0"), (192, 1, 2, "F32")])
def test_queries_of_heads(monkeypatch, n_nope, n_head, n_tokens, kind):
    """k_b's product makes images of them.

    Whole tiles of tokens come one after the other in a block, and one with few. Queries and their parts have very different sizes, one is
    zeros and one not finite.
    """
    monkeypatch.setattr(halved_heads, "BLOCKS", 64)
    k_b, q = tensor(kind, n_head, 512, n_nope), normal(n_tokens, n_head, n_nope + 64) * np.exp2(integers(-30, 30, n_tokens, n_head, 1))
    q[0, 0, n_nope:] *= 1e6
    q[1, 0] = 0
    if n_tokens > 2:
        q[2, 0, :n_nope] *= 1e6
        q[3, 1, 5], q[4, 1, n_nope + 1] = np.inf, np.nan
    found = unpacked(*halved_heads.absorbed(cuda.upload(q), cuda.weight(k_b)))
    expected = np.concatenate([np.einsum("hij,thj->thi", reference.weight(k_b), q[..., :n_nope].astype(np.float64)), q[..., n_nope:]], -1)
    finite, some = np.isfinite(q).all(-1), q.any(-1)
    assert np.isnan(found[~finite]).all() and not found[~some].any()
    of_parts = [nmse(found[finite & some][:, part], expected[finite & some][:, part]).max() for part in (slice(512), slice(512, None))]
    assert max(of_parts) < 4e-7


def test_plain_form_in_halves(monkeypatch):
    """Each kernel packs for the next one. One token has no row."""
    monkeypatch.setattr(int8x2.gemv, "MOST_TOKENS", 1)
    k_b, v_b = tensor("Q8_0", 16, 512, 128), tensor("Q8_0", 16, 8, 512)
    q, rows, indices = normal(3, 16, 192), Rows(normal(90, 576), "f16", 512), some_rows(90, 70, 70, 31, 0)
    scale = float((reference.weight(k_b).std() ** 2 * 512 * 128 + 64) ** -0.5)
    args = q, rows, indices, k_b, v_b, np.array([90, 91, 92]), scale
    found, expected = (run(backend, "mha_sparse_attention", [(3, 16, 8)], *args) for backend in (kernels, reference))
    assert halved_heads.ABSORB[128]._loaded and attend_chosen.ATTEND[True]._loaded
    assert nmse(found[:2], expected[:2]).max() < 10 * BOUND and not found[2].any()


def test_what_other_kernels_take():
    """Other widths and modes, few heads or tokens, models in exact precision.

    And outputs that are parts of others, and queries that are not aligned.
    """
    def chosen(widths=(512, 64), storage="i16", mode=modes.SPARSE, n_tokens=2, n_head=16, n_v=512, before=0):
        q = cuda.empty((n_tokens, n_head, sum(widths) + before), np.float32)[..., before:]
        out = cuda.empty((n_tokens, n_head, n_v), np.float32)[..., :widths[0]]
        parts = q[..., :widths[0]], q[..., widths[0]:]
        return variants.kernels("attention of many", out, *parts, cuda.cache_rows(4, widths, storage), mode)
    assert chosen(mode=modes.DENSE) and all(chosen(storage=storage) for storage in CACHE_TYPES) and chosen(n_head=128) and chosen(before=4)
    assert not (chosen((256, 64)) or chosen((512, 32)) or chosen(mode=modes.MASKED) or chosen(n_tokens=1)
                or chosen(n_head=15) or chosen(n_v=516) or chosen(before=2))
    with selected(current(), EXACT):
        assert not chosen()


def test_which_plain_form_is_in_halves(monkeypatch):
    """Not that of other widths, few tokens, or in exact precision.

    Nor with weights that stay float32.
    """
    monkeypatch.setattr(int8x2.gemv, "MOST_TOKENS", 1)

    def chosen(n_nope=128, width=64, kind="Q8_0", n_tokens=2, before=0):
        q = cuda.empty((n_tokens, 16, n_nope + width + before), np.float32)[..., before:]
        k_b, v_b = cuda.weight(tensor("F32", 16, 512, n_nope)), cuda.weight(tensor(kind, 16, 8, 512))
        pack = variants.kernels("linear", v_b, head_tiles(n_tokens, 16).single).pack
        return variants.kernels("mha of chosen rows", q, cuda.cache_rows(4, (512, 64), "i8"), k_b, v_b, pack)
    assert chosen() and chosen(192) and chosen(kind="Q4_0", before=4)
    assert not (chosen(64) or chosen(width=32) or chosen(kind="F32") or chosen(n_tokens=1) or chosen(before=2))
    with selected(current(), EXACT):
        assert not chosen()


def test_both_ways_are_timed(monkeypatch):
    """tools/time_kernels.py at a small shape: both ways, and their errors."""
    monkeypatch.setattr(time_kernels, "REPEATS", 1)
    sizes = {"kv-type": "i8"} | dict(tokens=3, heads=16, rows=70, chosen=20)
    done = CliRunner().invoke(time_kernels.main, ["chosen-rows", *(part for name, n in sizes.items() for part in (f"--{name}", str(n)))])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()[1:]
    assert [" TFLOP/s " in line for line in lines] == [False, False, True, True] and "wgmma" in lines[2] and "tiles" in lines[3]
