"""MLA's plain form beside the reference and beside the absorbed form: every type of cache and of weight, chunks after chunks, threads."""
import numpy as np
import pytest
from backends import DEVICE, choose, kernels
from test_ops import Rows, close, compare, last_positions, needs_two, normal, one_thread, run, tensor, with_threads  # noqa: F401

from pydsa.backends import reference
from pydsa.backends.cpu import amx
from pydsa.costs import MHA_TOKENS, plain_form_pays
from pydsa.model import ModelPlan
from pydsa.quants import FLOAT_ROWS, KV_TYPES

# heads, kv_lora, n_nope, n_rot, n_v; the last ones are V3.2's and GLM-5's
SHAPES = choose([(2, 32, 32, 4, 8)], [(1, 29, 17, 6, 13), (3, 64, 32, 16, 48), (2, 288, 64, 16, 16), (2, 512, 128, 64, 128),
                                      (1, 512, 192, 64, 256)])
CONTEXTS = choose([(2, 3)], [(1, 1), (7, 40), (33, 33), (40, 300), (130, 260)])     # n_tokens, n_kv


def inputs(n_tokens, n_kv, shape, kv_type="f32", kind="F32"):
    """q, latents, k_b, v_b, positions and a scale that keeps scores near 1."""
    n_head, kv_lora, n_nope, n_rot, n_v = shape
    k_b, v_b = tensor(kind, n_head, kv_lora, n_nope), tensor(kind, n_head, n_v, kv_lora)
    scale = (reference.weight(k_b).std() ** 2 * kv_lora * n_nope + n_rot) ** -0.5
    return (normal(n_tokens, n_head, n_nope + n_rot), Rows(normal(n_kv, kv_lora + n_rot), kv_type, kv_lora), k_b, v_b,
            last_positions(n_tokens, n_kv), float(scale))


def bound_of(kv_type):
    """Floats; or whole numbers of 16 bits all the way, where AMX multiplies them."""
    return 1e-7 if amx.HERE and kv_type != "f32" else 1e-11 if kv_type in FLOAT_ROWS else 1e-8


@pytest.mark.parametrize("kv_type", choose(["i16"], KV_TYPES))
@pytest.mark.parametrize("n_tokens, n_kv", CONTEXTS)
def test_mha_attention(n_tokens, n_kv, kv_type):
    for shape in SHAPES:
        args, out = inputs(n_tokens, n_kv, shape, kv_type), (n_tokens, shape[0], shape[4])
        found, expected = (run(backend, "mha_attention", [out], *args) for backend in (kernels, reference))
        assert close(found, expected, bound_of(kv_type)), shape


@pytest.mark.parametrize("kind", choose(["Q8_0"], ["Q8_0", "Q4_K", "Q6_K", "BF16"]))
def test_quantized_weights(kind):
    shape = choose((1, 32, 32, 4, 32), (2, 256, 256, 32, 32))
    args = inputs(*choose((2, 3), (50, 70)), shape, "i16", kind)
    compare("mha_attention", (len(args[0]), shape[0], shape[4]), *args)


def test_it_is_the_absorbed_form():
    """By the reference's own ops, exactly; so the plain form needs no other proof than the reference."""
    q, latents, k_b, v_b, positions, scale = inputs(9, 30, (3, 64, 32, 16, 48))
    n, (_, kv_lora, n_nope) = 9, k_b.shape
    absorbed = np.concatenate([run(reference, "head_linear", [(n, 3, kv_lora)], k_b, q[..., :n_nope]), q[..., n_nope:]], axis=-1)
    mixed = run(reference, "dense_attention", [(n, 3, kv_lora)], absorbed, latents, positions, scale)
    expected = run(reference, "head_linear", [(n, 3, 48)], v_b, mixed)
    assert close(run(reference, "mha_attention", [(n, 3, 48)], q, latents, k_b, v_b, positions, scale), expected, 1e-25)


@pytest.mark.parametrize("kv_type", ["f32", "i16"])
def test_it_sees_no_future(kv_type):
    """Rows after all tokens, whatever they hold, change nothing; those after a token only the rounding."""
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
    assert close(other[:-1], expected[:-1], bound_of(kv_type)) and not close(other[-1], expected[-1], 1e-3)


@pytest.mark.skipif(DEVICE != "cpu" or not amx.HERE, reason="floats that are not finite, times zero, are not zero")
def test_a_latent_that_is_not_finite_spoils_only_those_that_see_it():
    q, latents, k_b, v_b, positions, scale = inputs(20, 50, SHAPES[1], "f16")
    latents.values[40] = np.inf
    found = run(kernels, "mha_attention", [(20, 3, 48)], q, latents, k_b, v_b, positions, scale)
    assert np.isfinite(found[:10]).all() and not np.isfinite(found[10:]).any()


@needs_two
@pytest.mark.parametrize("kv_type", ["f32", "i16"])
@pytest.mark.parametrize("n_tokens", [1, 50])
def test_threads_share_heads_or_tokens(n_tokens, kv_type):
    """One head: two threads take half of the tokens each."""
    args = inputs(n_tokens, 100, SHAPES[0], kv_type)
    one, two = (with_threads(n, "mha_attention", (n_tokens, SHAPES[0][0], SHAPES[0][4]), *args) for n in (1, 2))
    assert close(two, one, 1e-12)


# Where models take it

def test_where_it_pays(small_model):
    """By hand, for V3.2's shapes: keys and values of a latent cost 512 * 256 products a head, a pair 320 instead of 1,088."""
    class V32:
        kv_lora, n_nope, n_rot, n_v = 512, 128, 64, 128
    for n_past, n_tokens in ((0, 512), (0, 48), (1536, 512), (100_000, 512), (1000, 16), (1000, 100), (4000, 150), (4000, 190)):
        pairs = n_tokens * n_past + n_tokens * (n_tokens + 1) // 2
        fewer = (n_past + n_tokens) * 131_072 + 320 * pairs < n_tokens * 131_072 + 1088 * pairs
        assert plain_form_pays(V32, n_past, n_tokens) == (fewer and n_tokens >= MHA_TOKENS)
    assert plain_form_pays(V32, 100_000, 512) and not plain_form_pays(V32, 0, MHA_TOKENS - 1) and not plain_form_pays(V32, 4000, 100)


@pytest.mark.parametrize("arch", ["deepseek2", "deepseek32", "glm-dsa"])
def test_prompts_take_it(small_model, load, arch):
    """From MHA_TOKENS tokens on, while all keys are attended to; what follows goes on from the same caches."""
    path = small_model(arch=arch, **{} if arch == "deepseek2" else dict(indexer_top_k=64))
    model, absorbed = load(path), load(path, n_ubatch=MHA_TOKENS - 1)
    ops = [[node.op for node in m.plan.plans[m.path(0, n)].graph.nodes] for m, n in ((model, 64), (model, 47), (absorbed, 47))]
    assert ["mha_attention" in found for found in ops] == [True, False, False]
    ids = np.random.default_rng(0).integers(0, 300, 80).tolist()
    sessions = model.session(), absorbed.session()
    for part in (ids[:60], ids[60:64], ids[64:70], ids[70:71]):
        one, other = (session.logits(part) for session in sessions)
        assert close(one, other, 1e-10)


def test_it_is_left_out_where_no_step_takes_it(small_model):
    def paths(**options):
        return list(ModelPlan(small_model(), n_ctx=100, **options).paths)
    assert paths(dsa_top_k=64) == ["mha+keys", "dense+keys", "sparse"]
    assert paths() == ["dense+keys", "sparse"] and paths(dsa_top_k=64, n_ubatch=16) == ["dense+keys", "sparse"]    # top_k is 12
    assert paths(dsa_top_k=100) == ["mha+keys", "dense+keys"] and paths(attention="dense") == ["mha", "dense"]


@pytest.mark.parametrize("kv_lora, n_rot, n_ctx", [(512, 64, 2048), (56, 12, 300), (288, 80, 2049)])
def test_planned_bytes_hold_what_is_laid(small_model, kv_lora, n_rot, n_ctx):
    from pydsa.backends.cpu.byte_mha import laid_bytes
    from pydsa.backends.cpu.float_mha import laid_float_bytes
    path = small_model(arch="deepseek2", n_lora_kv=kv_lora, n_rot=n_rot, n_ctx=4096)
    tiles = -(-n_ctx // 256)
    assert ModelPlan(path, n_ctx=n_ctx).laid_bytes == tiles * laid_bytes(kv_lora, n_rot) >= tiles * laid_float_bytes(kv_lora, n_rot)
    assert ModelPlan(path, n_ctx=n_ctx, n_ubatch=16).laid_bytes == 0 == ModelPlan(path, n_ctx=n_ctx, device="reference").laid_bytes


def test_laid_bytes_end_with_top_k(small_model):
    plans = [ModelPlan(small_model(), n_ctx=n_ctx, dsa_top_k=500) for n_ctx in (600, 2**20)]
    assert plans[0].laid_bytes == plans[1].laid_bytes > 0
