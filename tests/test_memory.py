"""Memory: counted and refused beforehand, mapped, shared.

Weights stay in the file. Values share a buffer only where they do not overlap in time.
"""
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from helpers import random_ids

import pydsa
from pydsa import OutOfMemoryError
from pydsa.backends.cpu.team.records import kind_of
from pydsa.backends.devices import BLOCKS, SCORE_BYTES, SCORED_AT_LEAST, device_of, tokens_scored_by_gpu
from pydsa.executor.graph import Value
from pydsa.executor.layout import ALIGN, lay_out
from pydsa.machine import limits
from pydsa.setup import Setup

MODELS = [dict(arch="deepseek2"), dict(), dict(arch="glm-dsa", n_layer=4, indexer_types="FSFS")]
PATHS = [(spec, attention) for spec in MODELS for attention in ("auto", "dense", "sparse", "masked")
         if spec.get("arch") != "deepseek2" or attention in ("auto", "dense")]
IDS = random_ids(40)


@pytest.fixture
def free(monkeypatch):
    """free(n): from now on the machine reports n free bytes."""
    monkeypatch.setattr(limits, "limits", lambda root: [])
    return lambda n: monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=n))


# Before anything is allocated

@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_too_long_a_context_is_refused(small_model, free, device):
    free(2**36)
    pydsa.load(small_model(), n_ctx=16, device=device)      # so that imports are not counted
    tracemalloc.start()
    try:
        with pytest.raises(OutOfMemoryError, match=r"a context of 1073741824 tokens would take .* 64.0 GiB .* smaller context"):
            pydsa.load(small_model(), n_ctx=2**30, device=device)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [dict(n_ubatch=2**30, n_ctx=2**30, attention="masked"), dict(n_ctx=2**31 - 1, kv_type="bf16")])
def test_no_plan_overflows(small_model, free, options):
    free(2**38)
    planned = Setup(small_model(), **options)
    assert planned.scratch_bytes + planned.cache_bytes > 2**38
    with pytest.raises(OutOfMemoryError):
        pydsa.load(small_model(), **options)


def test_each_session_is_asked_for(small_model, load, free):
    model = load(small_model())
    free(model.setup.cache_bytes)
    model.session()
    free(model.setup.cache_bytes - 1)
    with pytest.raises(OutOfMemoryError, match="caches of a new session"):
        model.session()


def test_logits_of_every_token_are_asked_for(small_model, load, free):
    session = load(small_model()).session()
    free(40 * 300 * 4 - 1)
    with pytest.raises(OutOfMemoryError, match="logits of 40 tokens"):
        session.logits(IDS)
    assert session.n_past == 0 and session.prefill(IDS).shape == (300,)


# Counted bytes are the allocated ones

@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "i16", "i8"])
@pytest.mark.parametrize("spec", MODELS)
def test_planned_bytes_are_those_allocated(small_model, load, spec, device, kv_type):
    model = load(small_model(**spec), device=device, kv_type=kv_type, n_ubatch=16)
    assert model.setup.cache_bytes == sum(cache.nbytes for cache in model.session().caches.values())
    model.session().prefill(IDS)
    outputs = sum(array[0].nbytes for array in model.runner.on[device].outputs.values())
    assert model.setup.scratch_bytes == max(p.n_bytes for p in model.setup.layouts.values()) + outputs
    assert model.setup.copied_bytes == sum(w.nbytes for w in model.runner.on[device].weights.values() if isinstance(w, np.ndarray))
    assert model.setup.mapped_bytes == sum(model.setup.file.tensors[name].data.nbytes for name in model.runner.on[device].weights)


@pytest.mark.parametrize("spec", MODELS)
def test_scratch_does_not_grow_with_the_context(small_model, spec):
    def scratch(n_ctx, attention):
        return Setup(small_model(**spec), n_ctx=n_ctx, n_ubatch=64, attention=attention).scratch_bytes

    assert scratch(64, "auto") == scratch(2**30, "auto")
    if spec.get("arch") != "deepseek2":
        assert scratch(64, "sparse") == scratch(2**30, "sparse")
        assert scratch(2**20, "masked") > 64 * 4 * 2**20      # a row of the mask has a float for every key


def test_gpus_score_as_many_tokens_as_fit():
    """Whole rounds of blocks if there is room for one."""
    found = {n_kv: tokens_scored_by_gpu(n_kv) for n_kv in (1, 4096, 131_072, 163_840, 1_000_000, 2**30)}
    assert found[131_072] == found[163_840] == BLOCKS and found[2**30] == SCORED_AT_LEAST
    assert all(n % BLOCKS == 0 for n in (found[1], found[4096])) and found[4096] >= 8192 and BLOCKS > found[1_000_000] > SCORED_AT_LEAST
    assert all(n % 2 == 0 and (n == SCORED_AT_LEAST or 4 * n * n_kv <= SCORE_BYTES) for n_kv, n in found.items())
    assert device_of("cuda").scored_together(4096) == found[4096] and device_of("reference").scored_together(4096) > 2**30


def test_rows_of_scores_are_counted(small_model):
    from pydsa.backends.cpu.indexer import MAX_TASK_TOKENS
    from pydsa.backends.devices import SCORED_BY_THREADS
    assert SCORED_BY_THREADS >= 2 * MAX_TASK_TOKENS and Setup(small_model(), n_ctx=1000, n_ubatch=64).score_bytes == 64 * 4 * 1000
    assert Setup(small_model(), n_ctx=1000, n_ubatch=5).score_bytes == 5 * 4 * 1000
    assert Setup(small_model(), n_ctx=1000, attention="dense").score_bytes == 0 == Setup(small_model(arch="deepseek2")).score_bytes


@pytest.mark.parametrize("spec, attention", PATHS)
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_values_alive_together_do_not_overlap(small_model, spec, attention, device):
    """Values that are live at the same time do not overlap.

    A value is live from the first node that names it to the last, and while others of their levels run; the ids and positions are always
    live.
    """
    for planned in Setup(small_model(**spec), n_ctx=100, n_ubatch=17, attention=attention, device=device).layouts.values():
        graph, alive = planned.graph, {}
        assert sorted(map(id, graph.nodes)) == sorted(id(node) for _, node in planned.nodes)
        for level, node in planned.nodes:
            for value in {a.root for a in node.args if isinstance(a, Value) and a.rows == "tokens"}:
                alive.setdefault(value, []).append(level)
        alive |= {graph.input: [0, len(graph.nodes)], graph.positions: [0, len(graph.nodes)]}
        assert alive.keys() == planned.offsets.keys()
        sizes = {"float": planned.float_size, "int32": 4, "int64": 8}
        spans = [(nodes[0], nodes[-1], planned.offsets[value], value.name, 17 * int(np.prod(value.tail)) * sizes[value.dtype])
                 for value, nodes in alive.items()]
        spans = [(first, last, start, start + size, name) for first, last, start, name, size in spans]
        assert all(start % ALIGN == 0 and end <= planned.n_bytes for _, _, start, end, _ in spans)
        for i, (first, last, start, end, name) in enumerate(spans):
            for other_first, other_last, other_start, other_end, other in spans[:i]:
                assert last < other_first or other_last < first or end <= other_start or other_end <= start, (name, other)
        assert planned.n_bytes < 0.5 * sum(end - start for _, _, start, end, _ in spans)     # values do share memory


def test_values_with_places_of_their_own_give_the_same(small_model, load, monkeypatch):
    """Sharing memory changes no logits.

    The layout is compared with one where no two values share an address.
    """
    expected = load(small_model(), n_ubatch=16).logits(IDS)

    def unshared(graph, segments, max_tokens, *args):
        shared = lay_out(graph, segments, max_tokens, *args)
        step = -(-max_tokens * 512 * 8 // ALIGN) * ALIGN
        assert all(np.prod(value.tail) <= 512 for value in shared.offsets)
        return shared._replace(offsets={value: i * step for i, value in enumerate(shared.offsets)},
                               ends={"cpu": step * len(shared.offsets)})

    monkeypatch.setattr("pydsa.setup.lay_out", unshared)
    model = pydsa.load(small_model(), n_ctx=256, n_ubatch=16, kv_type="f32", threads=1)
    np.testing.assert_array_equal(model.logits(IDS), expected)


# Weights and steps

@pytest.mark.parametrize("spec", MODELS)
def test_matrices_stay_in_the_file(small_model, load, spec):
    model, n_matrices = load(small_model(**spec)), 0
    for name, tensor in model.setup.weights.used.items():
        assert not tensor.data.flags.writeable
        if len(tensor.shape) > 1:
            weight = model.runner.on["cpu"].weights[name].data
            assert weight.ctypes.data == tensor.data.ctypes.data and weight.shape == tensor.data.shape and not weight.flags.writeable
            n_matrices += 1
    assert n_matrices > 30


def test_unused_weights_are_not_counted(small_model):
    """The MTP block, and the indexer when attention is dense, do not count."""
    path = small_model(nextn=1)
    sparse, dense = Setup(path), Setup(path, attention="dense")
    assert sparse.mapped_bytes == Setup(small_model()).mapped_bytes < sum(t.data.nbytes for t in sparse.file.tensors.values())
    assert dense.mapped_bytes < sparse.mapped_bytes and dense.cache_bytes < sparse.cache_bytes


def test_an_op_is_compiled_once(small_model, load):
    """... for arguments of the same kinds, whatever their sizes and strides, so that nothing is compiled after loading."""
    signatures = {}
    for spec, attention in PATHS:
        model = load(small_model(**spec), attention=attention, n_ubatch=64)
        for path in model.setup.schedule.variants:
            for n_tokens, n_outputs in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2), (48, 0), (64, 1), (64, 64)):
                caches = model.runner.make_caches(model.setup, 100 + n_tokens)
                for node, _, args in model.runner.bind(path, caches, n_tokens, n_outputs).calls:
                    signatures.setdefault(node.op, set()).add(tuple(kind_of(a) for a in args))
    assert len(signatures) > 20 and not {op: met for op, met in signatures.items() if len(met) > 1}


def test_decoding_holds_on_to_nothing(small_model, load):
    session = load(small_model(), n_ctx=2000).session()
    for token in IDS:
        session.decode(token)
    tracemalloc.start()
    try:
        for token in IDS * 2:
            session.decode(token)
        before = tracemalloc.get_traced_memory()[0]
        for token in IDS * 10:
            session.decode(token)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000      # only the list of tokens grows
    finally:
        tracemalloc.stop()


WITHOUT_NUMBA = {
    "import": "import pydsa; dir(pydsa); pydsa.PydsaError",
    "Setup": "from pydsa.setup import Setup; p = Setup(sys.argv[1]); p.scratch_bytes, p.mapped_bytes, p.copied_bytes",
    "tokenizer": "import pydsa; pydsa.load_tokenizer(sys.argv[1]).encode('some text')",
    "info": "from pydsa.cli import main; main(['info', sys.argv[1]], standalone_mode=False)",
    "help": "from pydsa.cli import main; main(['--help'], standalone_mode=False)",
    "reference": "import pydsa; pydsa.load(sys.argv[1], device='reference').logits([1, 2, 3])",
}


@pytest.mark.parametrize("code", WITHOUT_NUMBA.values(), ids=WITHOUT_NUMBA)
def test_what_does_not_compute_imports_no_numba(small_model, code):
    code = f"import sys\n{code}\nassert not {{'numba', 'llvmlite'}} & set(sys.modules), 'numba was imported'"
    run = subprocess.run([sys.executable, "-c", code, small_model()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
