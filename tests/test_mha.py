"""MLA's plain form against the reference and the absorbed form.

Attention to all keys and to chosen ones, for every type of cache and weight.
"""
import numpy as np
import pytest
from helpers import (DEVICE, PRECISION, Rows, choose, close, compare, kernels, last_positions, normal, run, same_for_all_threads, some_keys,
                     tensor)

from pydsa import load
from pydsa.backends import cpu, reference
from pydsa.backends.devices import FLASH_WIDTHS, FORMS_BY_TILES, LONGEST_PLAIN, FormCosts
from pydsa.executor.schedule import MHA_TOKENS, plain_form_pays, plain_form_until
from pydsa.options import EXACT
from pydsa.quants import CACHE_TYPES
from pydsa.setup import Setup

pytestmark = pytest.mark.usefixtures("one_thread")
# (heads, kv_lora, n_nope, n_rot, n_v); the last two are V3.2's and GLM-5's
SHAPES = choose([(2, 32, 32, 4, 8)], [(1, 29, 17, 6, 13), (3, 64, 32, 16, 48), (2, 288, 64, 16, 16), (2, 512, 128, 64, 128),
                                      (1, 512, 192, 64, 256)])
CONTEXTS = choose([(2, 3)], [(1, 1), (7, 40), (33, 33), (40, 300), (130, 260)])     # n_tokens, n_kv


def inputs(n_tokens, n_kv, shape, kv_type="f32", kind="F32"):
    """q, latents, k_b, v_b, positions, and a scale that keeps scores near 1."""
    n_head, kv_lora, n_nope, n_rot, n_v = shape
    k_b, v_b = tensor(kind, n_head, kv_lora, n_nope), tensor(kind, n_head, n_v, kv_lora)
    scale = (reference.weight(k_b).std() ** 2 * kv_lora * n_nope + n_rot) ** -0.5
    return (normal(n_tokens, n_head, n_nope + n_rot), Rows(normal(n_kv, kv_lora + n_rot), kv_type, kv_lora), k_b, v_b,
            last_positions(n_tokens, n_kv), float(scale))


def bound_of(kv_type, shape):
    """The NMSE that is allowed for a cache type.

    It is that of float32, of 16-bit integers, which the CPU multiplies but for float32 caches, or of one float16 for shapes that a GPU may
    have flash attention for.
    """
    if DEVICE == "cuda" and PRECISION != EXACT and (*shape[2:], shape[1]) in FLASH_WIDTHS:
        return 1e-6
    return 1e-7 if DEVICE == "cpu" and kv_type != "f32" else 1e-11 if not CACHE_TYPES[kv_type].scaled else 1e-8


@pytest.mark.parametrize("kv_type", choose(["i16"], CACHE_TYPES))
@pytest.mark.parametrize("n_tokens, n_kv", CONTEXTS)
def test_mha_attention(n_tokens, n_kv, kv_type):
    for shape in SHAPES:
        args, out = inputs(n_tokens, n_kv, shape, kv_type), (n_tokens, shape[0], shape[4])
        found, expected = (run(backend, "mha_attention", [out], *args) for backend in (kernels, reference))
        assert close(found, expected, bound_of(kv_type, shape)), shape


@pytest.mark.parametrize("kv_type", choose(["f32"], ["f32", "f16", "i16", "i8"]))
@pytest.mark.parametrize("n_tokens, n_kv", CONTEXTS)
def test_mha_sparse_attention(n_tokens, n_kv, kv_type):
    """Attention to random keys, none, the latest, the earliest, and all.

    Attention to all keys is mha_attention.
    """
    for shape in SHAPES:
        args, out = inputs(n_tokens, n_kv, shape, kv_type), (n_tokens, shape[0], shape[4])
        positions = args[4]
        for indices in (some_keys(positions, 40), np.where(np.arange(n_kv) <= positions[:, None], np.arange(n_kv), -1).astype(np.int32)):
            found, expected = (run(backend, "mha_sparse_attention", [out], *args[:2], indices, *args[2:])
                               for backend in (kernels, reference))
            assert close(found, expected, bound_of(kv_type, shape)), shape
            assert np.isfinite(found).all() and not found[(indices < 0).all(axis=1)].any()
        assert close(found, run(kernels, "mha_attention", [out], *args), bound_of(kv_type, shape))


@pytest.mark.parametrize("kind", choose(["Q8_0"], ["Q8_0", "Q4_K", "Q6_K", "BF16"]))
def test_quantized_weights(kind):
    shape = choose((1, 32, 32, 4, 32), (2, 256, 256, 32, 32))
    args = inputs(*choose((2, 3), (50, 70)), shape, "i16", kind)
    compare("mha_attention", (len(args[0]), shape[0], shape[4]), *args)


def test_it_is_the_absorbed_form():
    """The plain form equals the absorbed form, exactly.

    Both are computed by the reference's own ops, so the plain form needs no other proof than the reference.
    """
    q, latents, k_b, v_b, positions, scale = inputs(9, 30, (3, 64, 32, 16, 48))
    n, (_, kv_lora, n_nope) = 9, k_b.shape
    absorbed = np.concatenate([run(reference, "head_linear", [(n, 3, kv_lora)], k_b, q[..., :n_nope]), q[..., n_nope:]], axis=-1)
    mixed = run(reference, "dense_attention", [(n, 3, kv_lora)], absorbed, latents, positions, scale)
    expected = run(reference, "head_linear", [(n, 3, 48)], v_b, mixed)
    assert close(run(reference, "mha_attention", [(n, 3, 48)], q, latents, k_b, v_b, positions, scale), expected, 1e-25)
    chosen = some_keys(positions, 12)
    mixed = run(reference, "sparse_attention", [(n, 3, kv_lora)], absorbed, latents, chosen, scale)
    expected = run(reference, "head_linear", [(n, 3, 48)], v_b, mixed)
    assert close(run(reference, "mha_sparse_attention", [(n, 3, 48)], q, latents, chosen, k_b, v_b, positions, scale), expected, 1e-25)


@pytest.mark.parametrize("kv_type", ["f32", "i16"])
def test_it_sees_no_future(kv_type):
    """Future cache rows have no influence beyond rounding.

    Rows after all tokens change nothing. A row that only some tokens see changes the others by rounding alone.
    """
    shape = SHAPES[0]
    n, n_kv = choose((2, 5), (20, 50))
    q, latents, k_b, v_b, positions, scale = inputs(n, n_kv, shape, kv_type)
    poisoned = latents._replace(values=np.concatenate([latents.values, np.full((9, latents.values.shape[1]), np.nan, np.float32)]))
    changed = latents._replace(values=latents.values.copy())
    changed.values[-1] *= -9
    out = (n, shape[0], shape[4])
    expected, same, other = (run(kernels, "mha_attention", [out], q, rows, k_b, v_b, positions, scale)
                             for rows in (latents, poisoned, changed))
    np.testing.assert_array_equal(same, expected)
    assert close(other[:-1], expected[:-1], bound_of(kv_type, shape)) and not close(other[-1], expected[-1], 1e-3)


@pytest.mark.skipif(DEVICE != "cpu", reason="floats that are not finite, times zero, are not zero")
@pytest.mark.parametrize("part", [slice(None), slice(0, 64), slice(64, None)])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_latent_that_is_not_finite_spoils_only_those_that_see_it(part, value):
    q, latents, k_b, v_b, positions, scale = inputs(20, 50, SHAPES[1], "f16")
    latents.values[40, part] = value
    found = run(kernels, "mha_attention", [(20, 3, 48)], q, latents, k_b, v_b, positions, scale)
    assert np.isfinite(found[:10]).all() and not np.isfinite(found[10:]).any()


@pytest.mark.parametrize("kv_type", ["f32", "i16"])
@pytest.mark.parametrize("n_tokens", [1, 50, 150])
def test_threads_share_heads_or_tokens(n_tokens, kv_type):
    args, out = inputs(n_tokens, max(100, 2 * n_tokens), SHAPES[0], kv_type), (n_tokens, SHAPES[0][0], SHAPES[0][4])
    assert same_for_all_threads("mha_attention", out, *args)
    chosen = some_keys(args[4], 30)
    assert same_for_all_threads("mha_sparse_attention", out, *args[:2], chosen, *args[2:])


# Where models use it

class V32:
    """V3.2's shapes.

    The keys and values of a latent cost 512 * 256 products a head; a pair costs 320 instead of 1,088.
    """
    n_head, kv_lora, n_nope, n_rot, n_v = 128, 512, 128, 64, 128


@pytest.mark.parametrize("n_past, n_tokens", [(0, 512), (0, 48), (1536, 512), (100_000, 512), (1000, 16), (1000, 100), (4000, 150),
                                              (4000, 190)])
def test_where_it_pays(n_past, n_tokens):
    n_kv = n_past + n_tokens
    pairs = n_tokens * n_past + n_tokens * (n_tokens + 1) // 2
    fewer = n_kv * 131_072 + 320 * pairs < n_tokens * 131_072 + 1088 * pairs
    assert plain_form_pays(V32, n_past, n_tokens) == (fewer and n_tokens >= MHA_TOKENS)
    if n_past >= 2048:      # each token chooses 2,048 keys
        fewer = n_kv * 131_072 + 320 * pairs < n_tokens * 131_072 + (1088 + 247) * 2048 * n_tokens
        assert plain_form_pays(V32, n_past, n_tokens, 2048) == (fewer and n_tokens >= MHA_TOKENS)


def test_what_forms_cost_where_it_runs():
    """The plain form pays up to some length, which was measured: docs/journal/sparse-attention.md."""
    few_heads = type("", (V32,), {"n_head": 16})

    def pays(config, *lengths, n_tokens=512, most=512):
        return [plain_form_pays(config, n_past, n_tokens, most, costs) for n_past in lengths]
    costs = cpu.VARIANTS["mha"]["f32"].kernels.costs
    assert pays(V32, 2048, 3072, most=2048) == pays(few_heads, 512, 1024) == [True, False]
    assert pays(few_heads, 512, n_tokens=2048) == [False]
    costs = cpu.VARIANTS["mha"]["int16"].kernels.costs
    assert pays(few_heads, 1536, 2560) == pays(few_heads, 1024, 3072, n_tokens=2048) == [True, False]
    assert pays(V32, 4096, most=2048) == [True]
    assert plain_form_pays(V32, 100_000, 512, None, costs)      # there are as many pairs in both forms
    for costs in [variant.kernels.costs for variant in cpu.VARIANTS["mha"].values()]:
        assert costs.plain >= LONGEST_PLAIN.plain and costs.gather <= LONGEST_PLAIN.gather


def test_a_model_takes_the_costs_of_its_backend(small_model):
    model = load(small_model(), n_ctx=1024, dsa_top_k=100, device="cpu")
    assert model.setup.schedule.costs == cpu.form_costs("i16")
    met = []
    for model.setup.schedule.costs in FORMS_BY_TILES, FormCosts(100, 0):
        met.append(model.setup.schedule.variant(200, 100))
    assert met == ["mha+choice", "sparse"]


def test_how_long_it_pays():
    assert plain_form_pays(V32, 100_000, 512) and plain_form_until(V32, 512, 10**6) == 10**6
    assert plain_form_until(V32, MHA_TOKENS - 1, 10**6) == 0
    for n_tokens, most in ((512, 2048), (100, 2048), (100, None)):
        until = plain_form_until(V32, n_tokens, 10**6, most)
        assert plain_form_pays(V32, until - n_tokens, n_tokens, most) and not plain_form_pays(V32, until + 1 - n_tokens, n_tokens, most)
    assert 2 * 2048 < plain_form_until(V32, 512, 10**6, 2048) < 3 * 2048
    assert plain_form_until(V32, 512, 3000, 2048) == 3000


@pytest.mark.parametrize("arch", ["deepseek2", "deepseek32", "glm-dsa"])
def test_prompts_take_it(small_model, load, arch):
    """Prompts of MHA_TOKENS tokens or more use the plain form.

    They use it while all keys are attended to, and some way beyond. Later steps continue from the same caches.
    """
    path = small_model(arch=arch, **{} if arch == "deepseek2" else dict(indexer_top_k=64))
    model, absorbed = load(path), load(path, n_ubatch=MHA_TOKENS - 1)
    model.setup.schedule.costs = FORMS_BY_TILES
    ids = np.random.default_rng(0).integers(0, 300, 200).tolist()
    for portions, ops in (([64, 1, 5], ["mha_attention", "absorbed", "absorbed"]), ([47, 60, 1], ["absorbed", "chosen", "absorbed"]),
                          ([130, 48], ["chosen", "chosen"])):
        sessions = model.session(), absorbed.session()
        for n, op in zip(portions, ops):
            n_past = sessions[0].n_past
            layout = model.setup.layouts[model.setup.schedule.variant(n_past, n)]
            met = {node.op for node in layout.graph.nodes} & {"mha_attention", "mha_sparse_attention"}
            assert met == {"absorbed": set(), "chosen": {"mha_attention" if arch == "deepseek2" else "mha_sparse_attention"}}.get(op, {op})
            one, other = (session.logits(ids[n_past:n_past + n]) for session in sessions)
            assert close(one, other, 1e-10)


def test_it_is_left_out_where_no_step_takes_it(small_model):
    def variants(**options):
        return list(Setup(small_model(), n_ctx=options.pop("n_ctx", 100), **options).schedule.variants)
    assert variants(dsa_top_k=64) == ["mha+keys", "dense+keys", "mha+choice", "sparse"]
    assert variants() == ["dense+keys", "mha+choice", "sparse"]        # top_k is 12
    assert variants(dsa_top_k=64, n_ubatch=16) == ["dense+keys", "sparse"]
    assert variants(dsa_top_k=100) == ["mha+keys", "dense+keys"] and variants(attention="dense") == ["mha", "dense"]
    assert variants(attention="sparse") == ["sparse"] and variants(attention="masked") == ["masked"]


@pytest.mark.parametrize("kv_lora, n_rot, n_ctx", [(512, 64, 2048), (56, 12, 300), (288, 80, 2049)])
def test_bytes_of_packed_latents(small_model, kv_lora, n_rot, n_ctx):
    from pydsa.backends.cpu import f32, int8x2, int16
    path = small_model(arch="deepseek2", n_lora_kv=kv_lora, n_rot=n_rot, n_ctx=4096)
    tiles = -(-n_ctx // 256)
    sizes = [tiles * kernels.tile_bytes(kv_lora, n_rot) for kernels in (int8x2.mha, f32.mha, int16.mha)]
    assert Setup(path, n_ctx=n_ctx).packed_latent_bytes == max(sizes)
    for options in ({"n_ubatch": 16}, {"device": "reference"}):
        assert Setup(path, n_ctx=n_ctx, **options).packed_latent_bytes == 0


def test_packed_latent_bytes_end_where_chosen_keys_are_looked_up(small_model):
    a, b = (Setup(small_model(), n_ctx=n_ctx, dsa_top_k=500) for n_ctx in (2**18, 2**20))
    assert a.schedule.plain_form_until == b.schedule.plain_form_until > 500
    assert Setup(small_model(), n_ubatch=16).schedule.plain_form_until == 0
    assert a.packed_latent_bytes == b.packed_latent_bytes > Setup(small_model(), n_ctx=500, dsa_top_k=500).packed_latent_bytes > 0
