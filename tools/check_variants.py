"""Check each variant of the table of CUDA kernels on a GPU.

    python tools/check_variants.py
    python tools/check_variants.py --variant "linear: f16"

A case is an op with its arguments. It is computed with one variant of the table (backends/cuda/variants.py), and without any, by the last
ones of the table: those take what all others leave, and have run for longest. What launches of one token do for others (JOINS) is checked
with a model's tokens: with one of these variants, and with none of them. Each variant is checked in a process of its own with a limit
of time, so that one that hangs, or leaves the GPU unusable, does not keep the others from being checked. The last line names what was wrong
as PYDSA_CUDA_WITHOUT takes it; so does the file --wrong. The exit code is 1 then.
"""
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

import pydsa
from pydsa.backends import cuda
from pydsa.backends.cuda.runtime.current import current, selected
from pydsa.backends.cuda.runtime.launch import KERNELS, compile_all
from pydsa.backends.cuda.variants import VARIANTS
from pydsa.options import EXACT
from pydsa.quants import SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":      # whatever is in PYTHONPATH
    sys.path.insert(0, str(ROOT))
from tools.make_model import ModelSpec, make_model  # noqa: E402
from tools.random_blocks import random_tensor  # noqa: E402

COMMAND = sys.executable, "-u", str(Path(__file__))
BOUND, FLIPPED = 1e-6, 1e-3         # NMSE; the share of chosen keys that may be others, as scores differ in their last bits
NOT_TAKEN = "takes none of the cases here"
STORAGES = "i16", "i8", "f16", "bf16", "f32"
TOKENS = "tokens"
JOINS = "rows of products", "choice of experts", "scores of one"       # ops of the table that are about launches
# a layer of experts behind dense ones, whose launches are those of DeepSeek V3.2's
LAYERS = ModelSpec(type="Q8_0", n_layer=3, n_layer_dense=2, n_embd=256, n_lora_q=256, n_lora_kv=512, n_nope=128, n_rot=64, n_v=128,
                   n_ff=256, n_ff_exp=256, n_expert=4, indexer_head_size=128, indexer_top_k=4, n_vocab=300)


class Case(NamedTuple):
    """An op with its arguments: numpy arrays, Tensors, Rows, numbers.

    Or TOKENS: of a model whose file is the argument.
    """
    name: str
    op: str
    out: tuple          # the shape of what it computes
    args: tuple
    dtype: type = np.float32


class Rows(NamedTuple):
    """Cache rows of these values, all of them."""
    values: np.ndarray
    widths: tuple
    storage: str


class Sizes(NamedTuple):
    """Sizes of the cases: those of DeepSeek V3.2 or less."""
    tokens: tuple = (1, 17, 130, 600)
    columns: tuple = (768, 2304)
    kinds: tuple = tuple(SUPPORTED)
    storages: tuple = STORAGES
    heads: int = 128
    width: int = 512            # of a latent; behind it are 64 for positions
    head: int = 128
    keys: int = 2600
    chosen: int = 600
    queries: tuple = (1, 5, 130)
    index_heads: int = 64
    scored: int = 9000
    layers: ModelSpec = LAYERS


SMALL = Sizes((1, 9), (256,), ("Q4_K", "F16"), ("i16",), 4, 32, 32, 30, 8, (1, 3), 4, 40, replace(LAYERS, n_layer=1, n_layer_dense=0))


def products(sizes, rng):
    """Cases of products: matrices, one a head, and experts, which few or many tokens use."""
    for kind in sizes.kinds:
        for n, tokens in zip(np.resize(sizes.columns, len(sizes.tokens)), sizes.tokens):
            matrix = random_tensor(kind, (1, 275, int(n)), rng)
            matrix = matrix._replace(shape=matrix.shape[1:], data=matrix.data[0])
            yield Case(f"{kind} x {tokens} tokens", "linear", (tokens, 275), (matrix, normal(rng, tokens, n)))
        tokens, n = sizes.tokens[-1], int(sizes.columns[0])
        experts, ids = random_tensor(kind, (4, 140, n), rng), np.zeros((tokens, 2), np.int32)
        ids[:, 1] = 1 + 2 * rng.integers(0, 2, tokens)      # nobody uses one of them
        yield Case(f"{kind}, experts", "moe_linear", (tokens, 2, 140), (normal(rng, tokens, n), ids, experts))
        yield Case(f"{kind}, heads", "head_linear", (9, 4, 140), (experts, normal(rng, 9, 4, n)))


def attentions(sizes, rng):
    """Cases of attention: to all keys, masked, to chosen ones; absorbed and in the plain form."""
    k_b = random_tensor("Q8_0", (sizes.heads, sizes.width, sizes.head), rng)
    v_b = random_tensor("Q8_0", (sizes.heads, sizes.head, sizes.width), rng)
    for storage in sizes.storages:
        for tokens in sizes.queries:
            widths = sizes.width, 64
            rows, q = Rows(normal(rng, sizes.keys, sum(widths)), widths, storage), normal(rng, tokens, sizes.heads, sum(widths))
            positions, scale = np.arange(sizes.keys - tokens, sizes.keys), 0.05
            chosen = [np.sort(rng.permutation(sizes.keys - tokens)[:sizes.chosen]) for _ in range(tokens)]
            indices = np.stack(chosen).astype(np.int32)
            mask = np.where(rng.random((tokens, sizes.keys)) < 0.5, 0, -np.inf).astype(np.float32)
            plain = normal(rng, tokens, sizes.heads, sizes.head + 64)
            what, out = f"{storage}, {tokens} tokens", (tokens, sizes.heads, sizes.width)
            yield Case(what, "dense_attention", out, (q, rows, positions, scale))
            yield Case(what, "masked_attention", out, (q, rows, mask, positions, scale))
            yield Case(what, "sparse_attention", out, (q, rows, indices, scale))
            out = tokens, sizes.heads, sizes.head
            yield Case(what, "mha_attention", out, (plain, rows, k_b, v_b, positions, scale))
            yield Case(what, "mha_sparse_attention", out, (plain, rows, indices, k_b, v_b, positions, scale))


def choices(sizes, rng):
    """Cases of the indexer: scores and the keys that they choose."""
    for storage in sizes.storages:
        for tokens in sizes.queries:
            keys, positions = Rows(normal(rng, sizes.scored, 128), (128,), storage), np.arange(sizes.scored - tokens, sizes.scored)
            args = normal(rng, tokens, sizes.index_heads, 128), normal(rng, tokens, sizes.index_heads), keys, positions, 0.125
            yield Case(f"{storage}, {tokens} tokens", "indexer_scores", (tokens, sizes.scored), args)
            yield Case(f"{storage}, {tokens} tokens", "indexer_select", (tokens, sizes.chosen), args, np.int32)
    for tokens in sizes.queries:
        yield Case(f"{tokens} rows", "top_k", (tokens, sizes.chosen), (normal(rng, tokens, sizes.scored),), np.int32)


def steps(sizes, folder):
    """The case of a model's tokens: a prompt, then one after the other."""
    path = make_model(Path(folder) / "model.gguf", sizes.layers)
    yield Case("of a model", TOKENS, (4, sizes.layers.n_vocab), (path,))


def logits_of_tokens(path):
    """Logits of a prompt and of tokens.

    The first token's kernels are launched one by one, the second one's are recorded and replayed.
    """
    session = pydsa.load(path, device="cuda", attention="sparse", kv_type="i16", n_ctx=32, n_ubatch=8).session()
    return np.stack([session.prefill([1, 5, 9, 13, 17]), *map(session.decode, (2, 8, 4))])


def normal(rng, *shape):
    """Normal float32 values."""
    return rng.standard_normal(shape, np.float32)


def computed(case):
    """What an op computes of a case, as a numpy array."""
    def argument(a):
        if isinstance(a, np.ndarray):
            return cuda.upload(a)
        if isinstance(a, Rows):
            rows = cuda.cache_rows(len(a.values), a.widths, a.storage)
            cuda.cache_write(rows, cuda.upload(a.values), cuda.upload(np.arange(len(a.values))))
            return rows
        return cuda.weight(a) if hasattr(a, "data") else a

    if case.op == TOKENS:
        return logits_of_tokens(*case.args)
    out = cuda.upload(np.full(case.out, -7, case.dtype))
    getattr(cuda, case.op)(out, *map(argument, case.args))
    return out.get()


def difference(found, expected):
    """The NMSE of two arrays.

    Of chosen keys it is the share that differs, in units for which BOUND is FLIPPED.
    """
    if found.dtype == np.int32:
        same = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, expected)]) / found.shape[-1]
        return (1 - same) / FLIPPED * BOUND
    places = np.isfinite(expected)
    if not np.array_equal(np.isfinite(found), places):
        return np.inf
    a, b = found[places].astype(np.float64), expected[places].astype(np.float64)
    return ((a - b) ** 2).sum() / (b ** 2).sum()


class NotTaken(Exception):
    """The variant that is checked does not take a case."""


class Only:
    """A context in which the table has the last variants only, and one more.

    Where that one is not taken, NotTaken is raised, at the end if the op is one of JOINS. Then the others of the table remain but JOINS.
    name: None for no more. precision: that of the variant.
    """

    def __init__(self, op, name=None):
        self._op, self._name, self.precision, self._taken = op, name, EXACT, False

    def __enter__(self):
        self._whole = {op: dict(variants) for op, variants in VARIANTS.items()}
        for op in JOINS if self._op in JOINS else self._whole:
            VARIANTS[op] = dict(list(self._whole[op].items())[-1:])
        if self._name:
            variant = self._whole[self._op][self._name]
            self.precision = variant.precision or EXACT
            others = VARIANTS[self._op] if self._op in JOINS else {"others": variant._replace(takes=self._refuse)}
            VARIANTS[self._op] = {self._name: variant._replace(takes=self._noted(variant.takes)), **others}
        return self

    def _noted(self, takes):
        def noted(*args):
            taken = takes(*args)
            self._taken |= bool(taken)
            return taken
        return noted

    @staticmethod
    def _refuse(*args):
        raise NotTaken

    def __exit__(self, kind, *error):
        VARIANTS.update(self._whole)
        if kind is None and self._name and not self._taken:
            raise NotTaken


def check_here(op, name, sizes):
    """Check a variant in this process.

    Returns how many cases it took, and what was wrong: [(case, difference)].
    """
    rng, taken, wrong, folder = np.random.default_rng(0), 0, [], tempfile.TemporaryDirectory()
    for case in (steps(sizes, folder.name) if op in JOINS else products(sizes, rng) if op == "linear" else
                 (*attentions(sizes, rng), *choices(sizes, rng))):
        try:
            with Only(op, name) as only, selected(current(), only.precision):
                found = computed(case)
        except NotTaken:
            continue
        taken += 1
        with Only(op), selected(current(), EXACT):
            error = difference(found, computed(case))
        click.echo(f"{case.op}, {case.name}: {error:.1e}")
        if not error <= BOUND:
            wrong.append((case, error))
    return taken, wrong


def check_apart(what, seconds, options):
    """Check a variant in a process of its own.

    Returns a line that tells how it ended, and whether something was wrong.
    """
    try:
        done = subprocess.run([*COMMAND, "--variant", what, *options], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stdout or b"").decode().splitlines()
        return f"hangs, or takes more than {seconds:.0f} s; the last case that ended: {said[-1] if said else 'none'}", True
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return said[-1] if said else "nothing was said", done.returncode != 0


def compile_kernels():
    """Compile all kernels of this GPU, in processes for all cores."""
    began, here = time.monotonic(), current().capability
    compile_all([kernel for kernel in KERNELS.values() if kernel.specific in (None, here)])
    click.echo(f"kernels compiled and loaded: {time.monotonic() - began:.0f} s")


def named():
    """The variants to check, as PYDSA_CUDA_WITHOUT names them: all but the last of each op."""
    return [f"{op}: {name}" for op, variants in VARIANTS.items() for name in list(variants)[:-1]]


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--variant", type=click.Choice(named()), metavar="OP: NAME", help="only this one, in this process")
@click.option("--small", is_flag=True, help="few small cases")
@click.option("--seconds", default=40.0, show_default=True, help="for each variant")
@click.option("--together", default=3, show_default=True, help="processes at a time")
@click.option("--wrong", "wrong_path", type=click.Path(dir_okay=False, path_type=Path), help="a file for the names of what was wrong")
def main(variant, small, seconds, together, wrong_path):
    cuda.check_device()
    if variant:
        taken, wrong = check_here(*variant.split(": "), SMALL if small else Sizes())
        for case, error in wrong[:5]:
            click.echo(f"WRONG: {case.op}, {case.name}: {error:.1e}")
        click.echo(f"{taken} cases, {len(wrong)} wrong" if taken else NOT_TAKEN)
        sys.exit(len(wrong) > 0)
    if not small:
        compile_kernels()
    bad = []
    with ThreadPoolExecutor(together) as pool:
        ended = pool.map(lambda what: check_apart(what, seconds, ["--small"] if small else []), named())
        for what, (line, is_wrong) in zip(named(), ended):
            click.echo(f"{what}: {line}")
            bad += [what] if is_wrong else []
            if wrong_path is not None:      # at once: this may be stopped
                wrong_path.write_text(", ".join(bad), encoding="utf-8")
    click.echo(f'PYDSA_CUDA_WITHOUT="{", ".join(bad)}"' if bad else "nothing is wrong")
    sys.exit(len(bad) > 0)


if __name__ == "__main__":
    main()
