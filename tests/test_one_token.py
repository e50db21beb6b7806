"""What a GPU does for one token: norms with sums and rounding, top-k of one row, attention of this and a few tokens.

Float64 is the measure. The kernels run as PTX, in the simulator where it knows their instructions, and on a GPU.
"""
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import DEVICE, IN_SIMULATOR, SIMULATED, Rows, choose, compare, integers, kernels, nmse, normal, rng, run, tensor

if DEVICE != "cuda":
    pytest.skip("these are kernels of GPUs", allow_module_level=True)

from pydsa.backends import cuda, gpus, reference  # noqa: E402
from pydsa.backends.cuda import attention, int8x2, modes, moe, top_k_one  # noqa: E402
from pydsa.backends.cuda.chosen import attend_one  # noqa: E402
from pydsa.backends.cuda.chosen.chosen_rows import Tile  # noqa: E402
from pydsa.backends.cuda.int8x2.gemv import gemv, grid_of  # noqa: E402
from pydsa.backends.cuda.int8x2.linear import LOW, Int8x2, place_of_quad, scratch_for, scratch_for_rows  # noqa: E402
from pydsa.backends.cuda.linear import head_tiles  # noqa: E402
from pydsa.backends.cuda.one_token import rows_one  # noqa: E402
from pydsa.backends.cuda.one_token.norm_one import MOST, Joined, add_norm, norm_is_wide  # noqa: E402
from pydsa.backends.cuda.runtime import launch  # noqa: E402
from pydsa.backends.cuda.runtime.current import current  # noqa: E402


of_gpus = pytest.mark.skipif(IN_SIMULATOR, reason="the simulator has not these instructions")


def unpacked(made, n):
    """The float64 values that an Int8x2 stands for, [rows, n], and its sums."""
    words, scales = made.packed.get(), made.scales.get().astype(np.float64)
    place = getattr(place_of_quad, "py_func", place_of_quad)        # in the simulator it is a function itself
    places = [place(q) + word for q in range(n // 16) for word in range(4)]
    high, low = (np.ascontiguousarray(words[:, np.array(places) + part], np.uint32).view(np.int8).astype(int) for part in (0, LOW))
    return (256 * high + low) * np.repeat(scales, 32, 1), made.sums.get() * np.repeat(scales, 2, 1)


WIDTHS = [32, 64] if IN_SIMULATOR else [32, 1056, 4128, 7168, 8192]


@pytest.mark.parametrize("n_added", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("n", WIDTHS)
def test_norm_with_sums_and_rounding(n, n_added):
    """Widths of a part of a block, of a block and a bit, and of two.

    Where n_added is negative sums and norm are put where a summand was, as in a step.
    """
    x, y, z, w = normal(1, n), normal(2, n)[:1], normal(3, n)[:1], normal(n)
    added, total, in_place = [cuda.upload(x)], x.astype(np.float64), n_added < 0
    for other in (y, z)[:abs(n_added)]:
        total = total + other
        added.append(cuda.upload(other))
        added.append(added[len(added) // 3] if in_place else cuda.upload(np.full_like(x, np.nan)))
    out = added[-2] if in_place else cuda.upload(np.full_like(x, np.nan))
    made = scratch_for(out)
    assert norm_is_wide(added, out, cuda.upload(w))
    add_norm(added, out, cuda.upload(w), np.float32(1e-6), None, None, made)
    expected = total / np.sqrt((total ** 2).mean() + 1e-6) * w
    met = out.get()
    assert nmse(met, expected) < 1e-13
    assert in_place or all(nmse(a.get(), sum(map(np.float64, (x, y, z)[:i + 2]))) < 1e-14 for i, a in enumerate(added[2::2]))
    rounded, sums = unpacked(made, n)
    assert nmse(rounded, met) < 3e-9 and np.allclose(sums, rounded.reshape(1, -1, 16).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, used, n_out", [(64, 3, 3)] if IN_SIMULATOR else [(7168, 8, 5), (1056, 3, 4), (32, 1, 1)])
def test_norm_of_experts_and_its_product(n, used, n_out):
    """Experts' outputs are weighted and added, then two more rows.

    The norm is multiplied with a matrix.
    """
    outputs, weights, y, z, w, matrix = normal(used, n), normal(1, used), normal(1, n), normal(2, n)[1:], normal(n), normal(n_out, n)
    rows = [cuda.upload(np.full((1, n), np.nan, np.float32)) for _ in range(4)]
    added, product = [rows[0], cuda.upload(y), rows[1], cuda.upload(z), rows[2]], cuda.upload(np.full((1, n_out), np.nan, np.float32))
    data = cuda.Weight(cuda.upload(matrix.reshape(-1).view(np.uint8)), "F32", matrix.shape, 4 * n)
    made = scratch_for(rows[3])
    joined = Joined(cuda.upload(outputs), cuda.upload(weights))
    add_norm(added, rows[3], cuda.upload(w), np.float32(1e-6), joined, (product, data), made)
    x = weights.astype(np.float64) @ outputs
    expected = (x + y + z) / np.sqrt(((x + y + z) ** 2).mean() + 1e-6) * w
    for met, wanted in zip(rows, (x, x + y, x + y + z, expected)):
        assert nmse(met.get(), wanted) < 1e-13
    assert nmse(product.get(), expected @ matrix.T.astype(np.float64)) < 1e-12
    assert nmse(unpacked(made, n)[0], rows[3].get()) < 3e-9


def test_norms_that_are_not_wide():
    """Rows that are too long or not aligned to 16 bytes are left to the ops."""
    def is_wide(x):
        return norm_is_wide([x], x, cuda.empty((x.shape[1],), np.float32))
    row = cuda.empty((1, MOST + 64), np.float32)
    assert is_wide(row[:, :MOST]) and not is_wide(row) and not is_wide(row[:, 1:33]) and is_wide(row[:, 4:36])
    assert not is_wide(cuda.empty((2, 32), np.float32))


KINDS = [("Q8_0", 64)] if IN_SIMULATOR else [("Q4_K", 512), ("Q8_0", 96), ("Q6_K", 1280)]


@pytest.mark.parametrize("kind, n", KINDS)
def test_products_of_one_input(kind, n):
    """Two to four matrices of other numbers of rows, in one launch.

    Each block makes the norm that is multiplied.
    """
    x, w = normal(1, n), normal(n)
    rows, gain = cuda.upload(x), cuda.upload(w)
    normed, out = cuda.upload(np.full_like(x, np.nan)), cuda.empty((1, n), np.float32)
    cuda.rms_norm(out, rows, gain, np.float32(1e-6))
    made, tiles = int8x2.linear.pack(out), head_tiles(1, 1)
    for sizes in ((37, 5), (3, 70, 1), (66, 1, 40, 33)):
        weights, expected = [], []
        for size in sizes:
            weights.append(cuda.weight(tensor(kind, size, n)))
            expected.append(cuda.upload(np.full((1, size), np.nan, np.float32)))
            gemv([expected[-1]], weights[-1:], made, tiles)
        for source in (made, rows_one.Rows(rows_one.NORMED, normed, rows, gain=gain, eps=np.float32(1e-6))):
            outs = [cuda.upload(np.full((1, size), np.nan, np.float32)) for size in sizes]
            gemv(outs, weights, source, tiles)
            assert all(nmse(a.get(), b.get()).max() < (1e-12 if source is made else 1e-8) for a, b in zip(outs, expected))
    assert nmse(normed.get(), out.get()) < 1e-13


@pytest.mark.parametrize("kind, n", KINDS)
def test_products_of_gated_rows(kind, n):
    """Chosen experts and a shared one, whose blocks make silu(gate) up.

    With rows that are given they do the same.
    """
    n_out, ids = 5, cuda.upload(np.array([2, 0], np.int32))
    experts, shared = cuda.weight(tensor(kind, 3, n_out, n)), cuda.weight(tensor(kind, n_out, n))
    gates, ups = normal(3, n), normal(4, n)[:3]
    hidden = cuda.upload(np.full((3, n), np.nan, np.float32))
    cuda.silu_mul(hidden, cuda.upload(gates), cuda.upload(ups))
    made, tiles = int8x2.linear.pack(hidden), moe.pair_tiles(ids.reshape(1, 2), 3, 1)
    found = []
    parts = [cuda.upload(np.ascontiguousarray(a)) for a in (gates[:2], ups[:2], gates[2:], ups[2:])]
    written = [cuda.upload(np.full((rows, n), np.nan, np.float32)) for rows in (2, 1)]
    rows = rows_one.Rows(rows_one.GATED, written[0], *parts[:2], written[1], *parts[2:])
    for source, row in ((made, 2), (rows, 0)):
        outs = [cuda.upload(np.full((rows, n_out), np.nan, np.float32)) for rows in (2, 1)]
        gemv([outs[0], None, outs[1]], [experts, None, shared], source, tiles, row)
        found.append(np.concatenate([out.get() for out in outs]))
    assert np.array_equal(*found) and np.isfinite(found[0]).all()
    assert np.array_equal(np.concatenate([a.get() for a in written]), hidden.get())
    one = cuda.upload(np.full((1, n_out), np.nan, np.float32))
    gemv([one], [shared], Int8x2(*(part[2:] for part in made)), head_tiles(1, 1))
    assert nmse(one.get(), found[0][2:]) < 1e-12


@of_gpus
@pytest.mark.parametrize("kind, n, n_out", [("Q8_0", 512, 64), ("Q4_K", 512, 96)])
def test_outputs_are_rounded_where_they_are_made(kind, n, n_out):
    """Heads' outputs become one row; the floats stay as they are."""
    heads = 3
    w, x, tiles = cuda.weight(tensor(kind, heads, n_out, n)), cuda.upload(normal(heads, n)), head_tiles(1, heads)
    outs = [cuda.upload(np.full((heads, n_out), np.nan, np.float32)) for _ in range(2)]
    assert grid_of(outs[:1], n, heads).rounds(n_out) and not grid_of(outs[:1], 1024, heads).rounds(n_out)
    made, expected = (scratch_for_rows(1, heads * n_out, name) for name in ("met", "expected"))
    gemv(outs[:1], [w], int8x2.linear.pack(x), tiles, 0, made)
    gemv(outs[1:], [w], int8x2.linear.pack(x), tiles)
    int8x2.linear.pack_into(outs[1].reshape(1, heads * n_out), expected)
    assert np.array_equal(outs[0].get(), outs[1].get())
    assert all(np.array_equal(a, b) for a, b in zip(unpacked(made, heads * n_out), unpacked(expected, heads * n_out)))


@pytest.mark.parametrize("kind", ["Q4_K"] if IN_SIMULATOR else ["Q4_K", "Q8_0", "F32"])
def test_products_of_a_few_tokens_are_those_of_each(monkeypatch, kind):
    """One matrix, one per head, and experts, of which tokens share some."""
    monkeypatch.setattr(int8x2.gemv, "MOST_TOKENS", 3)
    n_in, ids, listed = 256, np.array([[4, 1], [1, 0], [2, 4]], np.int32), {}
    w, heads, experts = tensor(kind, 17, n_in), tensor(kind, 2, 5, n_in), tensor(kind, 5, 9, n_in)
    cases = [("linear", (17,), w, normal(3, n_in)), ("head_linear", (2, 5), heads, normal(3, 2, n_in)),
             ("moe_gate_up", (2, 9), normal(3, n_in), ids, experts, experts),
             ("moe_down", (9,), normal(3, 2, n_in), ids, normal(3, 2), experts)]
    monkeypatch.setattr(launch.listing, "kernels", None)
    for op, shape, *args in cases:
        compare(op, (3, *shape), *args)
        launch.listing.kernels = listed
        run(kernels, op, [(3, *shape)], *args)
        launch.listing.kernels = None
    assert f"gemv_{kind.lower()}" in listed and not any("gemm" in name or "group" in name for name in listed)


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
    if n > 100_000 and kind not in ("ties", "normal"):
        pytest.skip("shorter rows show it")
    row = a_row(n, kind)
    scores, out = cuda.upload(row[None]), cuda.upload(np.full((1, k), 77, np.int32))
    assert top_k_one.takes(scores, k)
    top_k_one.choose_one(out, scores)
    assert np.array_equal(out.get()[0], best_of(row, k))


@pytest.mark.parametrize("end", [1, 2, G // 2, 2 * G, 2 * G + 1, 4 * G, 5 * G])
def test_top_k_of_a_row_that_ends_early(end):
    """What lies behind the position is not looked at, in one part or several."""
    n, k = 5 * G + 1, 7 if IN_SIMULATOR else 1000
    row, scores = a_row(n, "normal"), cuda.empty((1, n), np.float32)
    scores[0, :end].set(row[:end])          # tests/ptx stops at a read of what was never written
    out, positions = cuda.upload(np.full((3, k), 77, np.int32)), cuda.upload(np.array([5, 0, end - 1]))
    top_k_one.choose_one(out, scores, positions, 2)
    met = out.get()
    assert (met[:2] == 77).all() and np.array_equal(met[2], best_of(row[:end], k))


def test_rows_that_one_block_cannot_choose_from():
    """Several rows, and those whose parts are too long or choose too much."""
    def takes(n, k, rows=1):
        return top_k_one.takes(cuda.empty((rows, n), np.float32), k)
    assert takes(G, 8) and not takes(G, 8, 2) and not takes(8 * top_k_one.MOST, 2 * top_k_one.MOST)
    assert not takes(4 * top_k_one.MOST, top_k_one.MOST // 2)
    assert not top_k_one.takes(cuda.empty((1, G + 1), np.float32)[:, 1:], 8)


def chosen_rows(n_kv, n, valid):
    """n chosen rows of n_kv: `valid` that are some, then others that are none."""
    indices = np.full((1, n), -1, np.int32)
    indices[0, :valid] = np.sort(rng(n_kv).choice(n_kv, valid, replace=False))
    return indices


of_gpus = pytest.mark.skipif(IN_SIMULATOR, reason="the simulator has not these instructions")


def use_tiles(monkeypatch, storage, tile, processors=attend_one.PROCESSORS):
    """Let blocks have such tiles; the test is skipped on a GPU that cannot.

    The emulated one can. processors: among which keys are divided.
    """
    if not SIMULATED and tile not in attend_one.fits(storage):
        pytest.skip("blocks of this GPU have less shared memory")
    assert current().capability >= (8, 0)       # the backend has asked for it, and keeps it
    monkeypatch.setattr(attend_one, "fits", lambda storage: [tile])
    monkeypatch.setattr(attend_one, "room", lambda: 227 * 1024)
    monkeypatch.setattr(attend_one, "PROCESSORS", processors)
    monkeypatch.setattr(gpus.driver(), "capability", (9, 0), raising=False)


def uneven_rows(n, size):
    """n rows of different sizes, whose second parts are larger."""
    values = normal(n, 576) * np.exp2(integers(-size, size, n, 1))
    values[:, 512:] *= 3
    return values


# Kernels take seconds to compile. Left out are those whose tile another type of the same family has, and whose type another tile; of f16
# and bf16 only the products differ. A GPU runs them all.
LIKE_OTHERS = {("i8", (64, 32, 2)), ("f16", (32, 32, 2)), ("bf16", (64, 32, 1)), ("bf16", (32, 32, 1)), ("bf16", (32, 16, 1))}
PAIRS = [pair for pair in attend_one.ATTEND if pair not in LIKE_OTHERS]


@of_gpus
@pytest.mark.parametrize("storage, tile", choose(PAIRS, attend_one.ATTEND))
def test_attention_of_few_tokens(monkeypatch, storage, tile):
    """Whole and partial tiles of heads and keys, one or several a block.

    Chosen keys, and none; all keys, of tokens with few and many of them, some behind a mask.
    """
    use_tiles(monkeypatch, storage, tile, 4)
    rows = Rows(uneven_rows(130, 1), storage, 512)
    for n_head, n, valid in ((33, 100, 97), (3, 70, 0))[:2 if storage == "i8" else 1]:
        q = normal(1, n_head, 576) * np.float32(2)
        out = compare("sparse_attention", (1, n_head, 512), q, rows, chosen_rows(130, n, valid), 0.05)
        assert valid or not out.any()
    if storage == "bf16" and tile.buffers == 1:     # as f16, but for the products
        return
    positions, q = np.array([2, 129]), normal(2, 17, 576) * np.float32(2)
    compare("dense_attention", (2, 17, 512), q, rows, positions, 0.05)
    if tile.buffers == 2 or tile.heads == 16:       # the mask is read in one way
        mask = np.where(integers(0, 2, 2, 133) > 0, normal(2, 133), -np.inf).astype(np.float32)
        mask[:, 0] = 0
        compare("masked_attention", (2, 17, 512), q, rows, mask, positions, 0.05)


@of_gpus
def test_later_tiles_count_as_earlier_ones(monkeypatch):
    """Scores that grow from tile to tile, and that fall.

    Far enough to leave nothing of others.
    """
    use_tiles(monkeypatch, "i8", Tile(32, 32, 2), 1)
    q = normal(1, 2, 576)
    for sizes in (np.arange(1, 161), np.arange(160, 0, -1)):
        values = q[0, :1] * sizes[:, None].astype(np.float32) / 8 + normal(160, 576)
        compare("dense_attention", (1, 2, 512), q, Rows(values, "i8", 512), np.array([159]), 0.02)


@of_gpus
def test_many_parts_are_joined_and_rounded(monkeypatch):
    """More splits than are loaded at once, some empty, and sharp weights.

    The result is rounded for the product that takes it.
    """
    use_tiles(monkeypatch, "i8", Tile(32, 32, 2))
    rows, n_head, n = Rows(uneven_rows(100, 1), "i8", 512), 3, 32 * attend_one.AT_ONCE + 40
    q, indices = normal(1, n_head, 576) * np.float32(20), np.full((1, n), -1, np.int32)
    indices[0, 64:n - 7:3] = np.sort(rng(4).integers(0, 100, len(indices[0, 64:n - 7:3])))
    cache = cuda.cache_rows(100, (512, 64), "i8")
    cuda.cache_write(cache, cuda.upload(rows.values), cuda.upload(np.arange(100)))
    out = cuda.upload(np.full((1, n_head, 512), np.nan, np.float32))
    made = scratch_for(out.rows)
    attention.attend(out, cuda.upload(q), cache, modes.SPARSE, n, 0.05, indices=cuda.upload(indices), made=made)
    some = indices[:, indices[0] >= 0]      # the reference ends at the first that is none
    expected = run(reference, "sparse_attention", [(1, n_head, 512)], q, rows, some, 0.05)
    assert nmse(out.get(), expected).max() < 1e-7
    assert nmse(unpacked(made, 512)[0], out.get()[0]).max() < 3e-9


@of_gpus
@pytest.mark.parametrize("storage, tile", [("i16", Tile(64, 32, 2)), ("f16", Tile(32, 16, 1))])
def test_nan_stays_where_it_is_chosen(monkeypatch, storage, tile):
    """A row of NaN spoils what chose it, a query of NaN its own head only."""
    use_tiles(monkeypatch, storage, tile, 1)
    values, q, indices = normal(80, 576), normal(1, 4, 576), np.arange(10, 80, dtype=np.int32)[None]
    values[5], q[0, 2, 560] = np.nan, np.nan
    rows = Rows(values, storage, 512)
    out = run(kernels, "sparse_attention", [(1, 4, 512)], q, rows, indices, 0.05)
    assert np.isfinite(out[0, [0, 1, 3]]).all() and np.isnan(out[0, 2]).all()
    indices[0, 40] = 5
    assert np.isnan(run(kernels, "sparse_attention", [(1, 4, 512)], q, rows, indices, 0.05)).all()


@of_gpus
def test_both_ways_are_timed(monkeypatch):
    """tools/time_kernels.py at small shapes: of two lines the second has the error beside the first."""
    from tools import time_kernels      # not for the simulator
    monkeypatch.setattr(int8x2.gemv, "MOST_TOKENS", 8)
    monkeypatch.setattr(time_kernels, "REPEATS", 1)
    monkeypatch.setattr(time_kernels, "AT_ONCE", 1)
    sizes = {"kv-type": "i16"} | dict(rows=90, heads=2, chosen=40, scores=640, width=64, outputs=9)
    done = CliRunner().invoke(time_kernels.main, ["one-token", *(part for name, n in sizes.items() for part in (f"--{name}", str(n)))])
    assert done.exit_code == 0, done.output
    lines = [line.split("  ") for line in done.output.splitlines()[1:]]
    assert len(lines) == 16 and all(first[0] == second[0] for first, second in zip(lines[::2], lines[1::2]))
    assert all("before" in line for line in done.output.splitlines()[1::2]) and all(float(line[-1]) < 1e-6 for line in lines[1::2])


def test_rows_that_other_kernels_attend_to(monkeypatch):
    """Other widths, caches and numbers of tokens."""
    monkeypatch.setattr(attend_one, "fits", lambda storage: [] if storage == "f32" else [Tile(64, 32, 2)])

    def takes(widths=(512, 64), storage="i16", n_tokens=1):
        q, out = cuda.empty((n_tokens, 2, sum(widths)), np.float32), cuda.empty((n_tokens, 2, widths[0]), np.float32)
        return attend_one.takes(out, q, cuda.cache_rows(4, widths, storage), modes.DENSE, 100)
    assert takes() and takes(n_tokens=attend_one.MOST_TOKENS) and not takes((256, 64)) and not takes((512, 32))
    assert not takes(storage="f32") and not takes(n_tokens=attend_one.MOST_TOKENS + 1)


@of_gpus
def test_how_keys_are_divided(monkeypatch):
    """Blocks fill the GPU; there are no more splits than tiles."""
    def division(capability, *args):
        monkeypatch.setattr(attend_one, "current", lambda: SimpleNamespace(capability=capability))
        return attend_one.division(*args)
    assert division((9, 0), "i16", 1, 128, 2048, True) == ((64, 32, 2), 32)
    assert division((9, 0), "i16", 1, 64, 2048, True) == ((32, 32, 1), 64)
    assert division((9, 0), "i16", 1, 128, 131_072, False) == ((64, 32, 2), 33)
    assert division((9, 0), "i16", 8, 128, 131_072, False) == ((64, 32, 2), 4)
    assert division((9, 0), "f16", 1, 128, 131_072, False) == ((32, 32, 2), 33)
    assert division((9, 0), "f16", 1, 128, 2048, True) == ((64, 32, 1), 32)
    assert division((8, 0), "bf16", 1, 16, 32_768, False) == ((32, 32, 1), 132)
    assert division((8, 9), "bf16", 1, 16, 32_768, False) == ((32, 16, 1), 132)
    assert division((9, 0), "f32", 1, 128, 2048, True) == ((32, 32, 1), 33)
    assert division((8, 0), "f32", 1, 128, 2048, True) == ((32, 16, 1), 16)
    assert division((8, 9), "f32", 1, 128, 2048, True) == ((16, 16, 1), 16)
    assert division((12, 0), "i8", 1, 128, 100, False) == ((32, 32, 2), 4)
    assert max(attend_one.division("i8", 1, 1, 1 << 20, chosen)[1] for chosen in (False, True)) <= attend_one.MOST_SPLITS
