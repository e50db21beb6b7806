"""Time and check kernels on a GPU, older ones beside newer ones.

    python tools/time_kernels.py products --tokens 512 --shape 1536x7168 --type Q6_K
    python tools/time_kernels.py one-token
    python tools/time_kernels.py --help

Each line has what is computed, by which kernels, microseconds, a rate, and the error (NMSE, or rows of choices that differ) beside float64
or beside the line before. Shapes are those of DeepSeek V3.2. The exit code is 1 if an error is too large.
"""
import contextlib
import importlib
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

from pydsa.backends import cuda, reference
from pydsa.backends.cuda import attention, f16x2, modes
from pydsa.backends.cuda.chosen import attend_chosen, attend_one, half_rows
from pydsa.backends.cuda.int8x2.linear import pack_into, scratch_for
from pydsa.backends.cuda.linear import head_tiles
from pydsa.backends.cuda.moe import pair_tiles
from pydsa.backends.cuda.one_token.norm_one import add_norm
from pydsa.backends.cuda.runtime.array import scratch
from pydsa.backends.cuda.runtime.current import gpu
from pydsa.backends.cuda.variants import VARIANTS, kernels
from pydsa.backends.devices import FLASH_WIDTHS, tokens_scored_by_gpu
from pydsa.gguf.file import Tensor
from pydsa.options import EXACT, FLOAT16
from pydsa.quants import CACHE_TYPES, SUPPORTED, TYPES

if __name__ == "__main__":      # whatever is in PYTHONPATH
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.random_blocks import RANDOM_ROWS, random_tensor  # noqa: E402

TOP_K = importlib.import_module("pydsa.backends.cuda.top_k")        # the package has a function of this name
REPEATS = 5                 # of what is timed, the fastest counts
AT_ONCE = 50                # launches of one token's kernels in a repeat, one after the other, as in a step
COLD = 128 << 20            # bytes of all matrices of a product of one token: more than a second-level cache holds
DIFFERENT = 4096            # rows of a cache; they are repeated
VALUE, ROTATED = half_rows.VALUE, 64        # of a latent
RNG = np.random.default_rng(0)


class Timed(NamedTuple):
    """A line: what was computed by which kernels, and how fast.

    rate: in units a second, `unit`. error: of what was computed, None where it is the measure of others; up to `bound` it is no mistake.
    """
    what: str
    how: str
    seconds: float
    error: float | None = None
    bound: float = 1e-6
    rate: float | None = None
    unit: str = "TFLOP/s"

    @property
    def is_wrong(self):
        return self.error is not None and not self.error <= self.bound      # NaN, too

    def __str__(self):
        rate = "" if self.rate is None else f"{self.rate / {'TFLOP/s': 1e12, 'GB/s': 1e9}[self.unit]:.1f} {self.unit}"
        error = "" if self.error is None else f"{self.error:.1e}"
        return f"{self.what:64} {self.how:36} {self.seconds * 1e6:12.2f} {rate:>15} {error:>8}{' WRONG' if self.is_wrong else ''}".rstrip()


@click.group(help=__doc__.split("\n\n")[0])
def main():
    pass


def timing(name):
    """Make a sub-command of a function that yields Timed."""
    def make(function):
        def run(**options):
            cuda.check_device()
            wrong = 0
            click.echo(f"{'':64} {'':36} {'us':>12} {'rate':>15} {'error':>8}")
            for line in function(**options):
                click.echo(line)
                wrong += line.is_wrong
            if wrong:
                raise SystemExit(f"{wrong} errors are too large")
        run.__click_params__ = getattr(function, "__click_params__", [])
        main.command(name, help=function.__doc__)(run)
        return function
    return make


def several(name, *default, of=None, help=None):
    """An option that may be given several times."""
    target = {"kv-type": "storages", "type": "kinds", "shape": "shapes", "keys": "lengths", "heads": "heads_of", "rows": "depths"}[name]
    kind = of or (type(default[0]) if isinstance(default[0], str) else click.IntRange(min=1))
    return click.option(f"--{name}", target, multiple=True, type=kind, default=default,
                        help=f"{help or ''}  [{', '.join(map(str, default))}]".strip())


def number(name, default, least=1, help=None):
    return click.option(f"--{name}", type=click.IntRange(min=least), default=default, show_default=True, help=help)


def seconds(work, at_once=1):
    """The least time of work(), which launches kernels.

    at_once: how often it is called for one figure.
    """
    work()      # scratch memory grows, kernels are compiled and loaded
    return min(gpu.time_each([lambda: [work() for _ in range(at_once)]] * REPEATS)) / at_once


def nmse(found, expected):
    expected = expected.astype(np.float64)
    return float(((found - expected) ** 2).sum() / (expected ** 2).sum())


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def cache_of(n, widths, storage):
    """A cache of n random rows, and the values of the different ones."""
    values, cache = normal(min(n, DIFFERENT), sum(widths)), cuda.cache_rows(n, widths, storage)
    given = cuda.upload(values)
    for start in range(0, n, len(values)):
        count = min(n - start, len(values))
        cuda.cache_write(cache, given[:count], cuda.upload(np.arange(start, start + count)))
    return cache, values


@contextlib.contextmanager
def without_first(op):
    """A context in which an op's first variant is missing."""
    whole = VARIANTS[op]
    VARIANTS[op] = dict(list(whole.items())[1:])
    try:
        yield
    finally:
        VARIANTS[op] = whole


def both_ways(what, op, work, result, at_once=1, error=nmse, bound=1e-6):
    """Yield the times of work() without an op's first variant, and with it.

    error(found, expected): that of result(), the array of the device that work() writes.
    """
    with without_first(op):
        yield Timed(what, "before", seconds(work, at_once))
        expected = result().get()
    yield Timed(what, next(iter(VARIANTS[op])), seconds(work, at_once), error(result().get(), expected), bound)


class Product(NamedTuple):
    """A product: matrices of n_out rows, of which `used` are multiplied. own: each with a row of its own."""
    name: str
    matrices: int
    used: int
    n_out: int
    n_in: int
    own: bool = False


PRODUCTS = [Product("gate, up", 1, 1, 18432, 7168), Product("down", 1, 1, 7168, 18432), Product("q_a", 1, 1, 1536, 7168),
            Product("8 experts' gate", 16, 8, 2048, 7168), Product("8 experts' down", 16, 8, 7168, 2048, True),
            Product("k_b", 128, 128, 512, 128, True), Product("v_b", 128, 128, 128, 512, True)]
SMALL = [Product("rows", 1, 1, 67, 1792), Product("experts", 3, 2, 18, 1280), Product("heads", 3, 3, 33, 256, True)]


def product_of_a_token(product, kind, cold):
    """Time a product; its matrices have `cold` bytes, one after the other."""
    tensor = random_tensor(kind, (product.matrices, product.n_out, product.n_in), RNG)
    n_bytes = tensor.data.nbytes // product.matrices * product.used
    weights = [cuda.weight(tensor) for _ in range(min(AT_ONCE, -(-cold // n_bytes)))]
    x = normal(product.used if product.own else 1, product.n_in)
    ids = np.sort(RNG.permutation(product.matrices)[:product.used]).astype(np.int32)
    if product.used == product.matrices:
        tiles = head_tiles(1, product.matrices)
    else:
        tiles = pair_tiles(cuda.upload(ids[None]), product.matrices, 1 if product.own else product.used)
    op, out, turn = kernels("linear", weights[0], True), cuda.empty((product.used, product.n_out), np.float32), itertools.cycle(weights)
    packed = op.pack(cuda.upload(x))
    took = seconds(lambda: op.matmul(out, next(turn), packed, tiles), AT_ONCE)
    few = [Tensor("w", kind, (min(product.n_out, RANDOM_ROWS), product.n_in), tensor.data[i, :RANDOM_ROWS]) for i in ids]
    expected = np.stack([reference.weight(w).astype(np.float64) @ x[i if product.own else 0] for i, w in enumerate(few)])
    return Timed(f"{kind} {product.name}", "gemv", took, nmse(out.get()[:, :RANDOM_ROWS], expected), 1e-7, n_bytes / took, "GB/s")


@timing("products-of-a-token")
@several("type", "Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "BF16", of=click.Choice(SUPPORTED), help="of weights")
@click.option("--small", is_flag=True, help="small matrices, to try the tool")
def products_of_a_token(kinds, small):
    """One token's products: bytes of weights a second, beside float64.

    Activations are rounded before. Products are launched one after the other, over so many matrices that none is in the second-level cache.
    """
    for kind in kinds:
        for product in SMALL if small else PRODUCTS:
            if product.n_in % TYPES[kind].size == 0:
                yield product_of_a_token(product, kind, 1 if small else COLD)


def product_of_tokens(shape, n_tokens, kind):
    """Yield the times of a product by all variants that take it.

    Errors are those of 16 tokens and 16 rows of the first matrix.
    """
    experts, n_out, n = (int(part or 1) for part in re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)", shape).groups())
    tensor, x = random_tensor(kind, (experts, n_out, n), RNG), normal(n_tokens, n)
    of_token = min(experts, 2)      # experts that a token uses
    ids = RNG.permuted(np.tile(np.arange(experts, dtype=np.int32), (n_tokens, 1)), axis=1)[:, :of_token].copy()
    w, values, out = cuda.weight(tensor), cuda.upload(x), cuda.empty((ids.size, n_out), np.float32)
    tiles = pair_tiles(cuda.upload(ids), experts, of_token) if experts > 1 else head_tiles(n_tokens, 1)
    pick, rows = np.flatnonzero(ids.ravel() == 0)[:16], min(16, n_out)
    weights = reference.weight(Tensor("w", kind, (rows, n), tensor.data[0, :rows])).astype(np.float64)
    for name, variant in VARIANTS["linear"].items():
        if variant.takes(w, False):
            took = seconds(lambda k=variant.kernels: k.matmul(out, w, k.pack(values), tiles))
            error = nmse(out.get()[pick][:, :rows], x[pick // of_token].astype(np.float64) @ weights.T)
            yield Timed(f"{shape} of {kind}, {n_tokens} tokens", name, took, error, 1e-9 if variant.precision is None else 1e-6,
                        2 * ids.size * n_out * n / took)


def torch_product(shape, n_tokens):
    """Yield the time of torch's product of float16, where torch is installed."""
    if importlib.util.find_spec("torch") is None or "*" in shape:
        return
    import torch
    n_out, n = map(int, shape.split("x"))
    x, w = (torch.randn(m, n, device="cuda", dtype=torch.float16) for m in (n_tokens, n_out))
    (begin, end), times = (torch.cuda.Event(enable_timing=True) for _ in range(2)), []
    for _ in range(REPEATS + 1):
        begin.record()
        x @ w.T
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    best = min(times[1:])
    yield Timed(f"{shape} of float16, {n_tokens} tokens", "torch", best, rate=2 * n_tokens * n_out * n / best)


@timing("products")
@number("tokens", 2048, 2)
@several("shape", "18432x7168", "7168x18432", "24576x1536", "64*2048x7168", help="rows x columns, or EXPERTS*ROWSxCOLUMNS")
@several("type", "Q4_K", "Q6_K", "Q8_0", of=click.Choice([*f16x2.linear.GEMM]), help="of weights")
def products(tokens, shapes, kinds):
    """Products of prompts by all variants, beside float64, and torch's."""
    for shape in shapes:
        for kind in kinds:
            yield from product_of_tokens(shape, tokens, kind)
        yield from torch_product(shape, tokens)


@timing("attention")
@number("tokens", 2048, 2)
@several("keys", 2048, 10240, help="of which the tokens are the last")
@number("heads", 128)
@click.option("--kv-type", "storage", type=click.Choice(list(CACHE_TYPES)), default="i16", show_default=True)
def attention_to_all(tokens, lengths, heads, storage):
    """Attention of prompts to all keys, in both precisions.

    It is that of the widths of all models. TFLOP/s are of MLA's plain form, keys and values included. Weights are Q8_0. Errors are beside
    the exact precision.
    """
    for (n_nope, n_rot, n_v, kv_lora), n_keys in itertools.product(FLASH_WIDTHS, lengths):
        n, exact = min(tokens, n_keys), None
        q, out = cuda.upload(normal(n, heads, n_nope + n_rot)), cuda.empty((n, heads, n_v), np.float32)
        k_b, v_b = (cuda.weight(random_tensor("Q8_0", shape, RNG, 0.001)) for shape in ((heads, kv_lora, n_nope), (heads, n_v, kv_lora)))
        args = q, cache_of(n_keys, (kv_lora, n_rot), storage)[0], k_b, v_b, cuda.upload(np.arange(n_keys - n, n_keys)), 0.07
        pairs = n * (n_keys - n) + n * (n + 1) // 2
        operations = 2 * heads * (pairs * (n_nope + n_rot + n_v) + n_keys * kv_lora * (n_nope + n_v))
        for precision in (EXACT, FLOAT16):
            with cuda.on(0, precision).selected():
                took = seconds(lambda args=args, out=out: cuda.mha_attention(out, *args))
            error, exact = (None, out.get()) if exact is None else (nmse(out.get(), exact), exact)
            yield Timed(f"{n} tokens, {n_keys} keys of {storage}, {n_nope} + {n_rot}, {n_v}", precision, took, error,
                        rate=operations / took)


def ways_to_chosen(q, out, cache, indices):
    """Yield (name, work, whether that writes out) for what is timed."""
    parts = q[..., :VALUE], q[..., VALUE:]
    if kernels("attention of many", out, *parts, cache, modes.SPARSE) is attend_chosen.attend:
        yield "rows as float16", lambda: half_rows.halved(cache, half_rows.facts_of(indices)), False
        yield "queries as float16", lambda: half_rows.halved_queries(*parts), False
        yield "wgmma, all", lambda: attend_chosen.attend(out, *parts, cache, indices, None, 0.05), True
    yield "tiles", lambda: attention.attend_in_tiles(out, q, cache, modes.SPARSE, indices.shape[1], 0.05, None, indices, None, None), True


@timing("chosen-rows")
@several("kv-type", "i16", "i8", "f16", help="of caches")
@number("tokens", 2048, 3)
@number("heads", 128)
@several("rows", 8192, 131072, help="of a cache")
@number("chosen", 2048, help="rows of a token")
def chosen_rows(storages, tokens, heads, depths, chosen):
    """Attention of prompts to chosen rows, beside float64.

    It is done in wgmma, with what that needs made beforehand, and in tiles. TFLOP/s are of the absorbed form, 576 + 512 numbers a pair of a
    token and a row.
    """
    few = normal(64, heads, VALUE + ROTATED)     # queries and choices repeat
    q, out = cuda.upload(np.resize(few, (tokens, *few.shape[1:]))), cuda.empty((tokens, heads, VALUE), np.float32)
    for n, storage in [(depths[0], storage) for storage in storages] + [(n, storages[0]) for n in depths[1:]]:
        cache, values = cache_of(n, (VALUE, ROTATED), storage)
        choices = np.stack([np.sort(RNG.choice(n, min(chosen, n), replace=False)) for _ in few]).astype(np.int32)
        choices[1, len(choices[1]) // 2:] = -1
        stored, expected = reference.cache_rows(len(values), (VALUE, ROTATED), storage), np.empty((3, heads, VALUE))
        reference.cache_write(stored, values, np.arange(len(values)))
        reference.sparse_attention(expected, few[:3].astype(np.float64), stored,
                                   np.where(choices[:3] < 0, -1, choices[:3] % len(values)), 0.05)
        for name, work, attends in ways_to_chosen(q, out, cache, cuda.upload(np.resize(choices, (tokens, choices.shape[1])))):
            took, what = seconds(work), f"{tokens} tokens, {choices.shape[1]} of {n} rows of {storage}, {heads} heads"
            yield Timed(what, name, took, nmse(out[:3].get(), expected), 1e-6, 2 * tokens * heads * choices.shape[1] * (
                2 * VALUE + ROTATED) / took) if attends else Timed(what, name, took)


def score_batches(rows, q, w, keys, positions):
    """Scores of all tokens, one batch after the other in the same rows."""
    pack, score = kernels("indexer", keys, *q.shape[:2])
    packed = pack(q, w)
    for start in range(0, len(q), len(rows)):
        score(rows[:len(q) - start], packed, keys, positions, start, np.float32(0.1), False)


def choose_batches(out, rows, positions):
    """The choice for as many tokens as score_batches() scores."""
    for start in range(0, len(out), len(rows)):
        TOP_K.choose(out, rows[:len(out) - start], positions, start)


@timing("scores")
@number("tokens", 2048, 2)
@several("keys", 4096, 131072)
@several("heads", 64, 32)
@number("chosen", 2048)
def scores(tokens, lengths, heads_of, chosen):
    """Scores of prompts and the choice of keys.

    Keys are int8, of 128 numbers; the tokens are the last ones of a context. Times are of all tokens, in batches as a prompt has them. The
    error of a choice is the number of rows that differ.
    """
    for n_keys, n_heads in itertools.product(lengths, heads_of):
        n = min(tokens, n_keys)
        q, w, keys = cuda.upload(normal(n, n_heads, 128)), cuda.upload(normal(n, n_heads)), cache_of(n_keys, (128,), "i8")[0]
        places, at_once = np.arange(n_keys - n, n_keys), min(n, tokens_scored_by_gpu(n_keys))
        positions, out = cuda.upload(places), cuda.empty((n, min(chosen, n_keys)), np.int32)
        rows = scratch("rows of scores", (at_once, -(-n_keys // 4) * 4), np.float32)[:, :n_keys]
        last = places[(n - 1) // at_once * at_once:]        # of the last batch, of which some rows are compared
        step = -(-len(last) // 9)
        there = np.arange(n_keys) <= last[::step, None]
        yield from both_ways(f"scores, {n} tokens of {n_heads} heads, {n_keys} keys", "indexer",
                             lambda: score_batches(rows, q, w, keys, positions), lambda: rows[:len(last):step],
                             error=lambda found, expected: nmse(found[there], expected[there]), bound=1e-12)
        yield from both_ways(f"top {out.shape[1]}, {n} tokens, {n_keys} keys", "top_k of many",
                             lambda: choose_batches(out, rows, positions), lambda: out,
                             error=lambda found, expected: int((found != expected).any(1).sum()), bound=0)


def attention_of_a_token(storages, rows, heads, chosen):
    """Attention to chosen rows of caches of some types, and to all."""
    q, out = cuda.upload(normal(1, heads, VALUE + ROTATED)), cuda.empty((1, heads, VALUE), np.float32)
    indices, made = cuda.upload(np.sort(RNG.choice(rows, chosen, replace=False)).astype(np.int32)[None]), scratch_for(out.rows)
    for storage in storages:
        cache = cache_of(rows, (VALUE, ROTATED), storage)[0]
        for n in (None, *sorted({min(rows, 1024), rows})):
            if n is None:
                what, args = f"{chosen} of {rows} rows", (modes.SPARSE, chosen, 0.05, None, indices)
            else:
                what, args = f"the first {n} rows", (modes.DENSE, rows, 0.05, cuda.upload(np.array([n - 1])))
            yield from both_ways(f"attention, {what} of {storage}, {heads} heads", "attention of a few", lambda cache=cache, args=args: (
                attention.attend(out, q, cache, *args, made=made)), lambda: out, AT_ONCE)


def norm_of_a_token(width):
    """A norm with two sums and rounding in one launch, and op by op."""
    x, y, z, w = *(cuda.upload(normal(1, width)) for _ in range(3)), cuda.upload(normal(width))
    first, second, out = (cuda.empty((1, width), np.float32) for _ in range(3))
    made, eps = scratch_for(out), np.float32(1e-6)

    def ops():
        cuda.add(first, x, y)
        cuda.add(second, first, z)
        cuda.rms_norm(out, second, w, eps)
        pack_into(out, made)
    what = f"norm of {width}, two sums, rounding"
    yield Timed(what, "before, by four ops", seconds(ops, AT_ONCE))
    expected = out.get()
    took = seconds(lambda: add_norm([x, y, first, z, second], out, w, eps, None, None, made), AT_ONCE)
    yield Timed(what, "one launch", took, nmse(out.get(), expected))


@timing("one-token")
@several("kv-type", *dict.fromkeys(storage for storage, _ in attend_one.ATTEND), help="of caches")
@number("rows", 65536, help="of a cache")
@number("heads", 128)
@number("chosen", 2048, help="rows")
@number("scores", 131072, 32, help="in the row of which the best are chosen")
@number("width", 7168, help="of a norm, and of products")
@number("outputs", 18432, help="of products of a few tokens")
def one_token(storages, rows, heads, chosen, scores, width, outputs):
    """What is done for one token beside products, and products of a few.

    Attention to chosen rows and to all, top-k of one row, norms with sums and rounding: by the kernels for one token, and by those that do
    the same for any number. Times are those of many launches in a graph, one after the other, as a step is.
    """
    yield from attention_of_a_token(storages, rows, heads, chosen)
    best, row = cuda.empty((1, chosen), np.int32), cuda.upload(normal(1, scores))
    for n in (scores // 32, scores // 4, scores):
        positions = cuda.upload(np.array([n - 1]))
        yield from both_ways(f"top {chosen} of {n} of {scores} scores", "top_k of one", lambda positions=positions: (
            TOP_K.choose(best, row, positions)), lambda: best, AT_ONCE)
    yield from norm_of_a_token(width)
    columns = -(-width // 256) * 256
    w = random_tensor("Q4_K", (1, outputs, columns), RNG)
    w = cuda.weight(w._replace(shape=w.shape[1:], data=w.data[0]))
    for n in (2, 8):
        x, out = cuda.upload(normal(n, columns)), cuda.empty((n, outputs), np.float32)
        yield from both_ways(f"[{outputs} x {columns}] of Q4_K times {n} tokens", "products of a few", lambda x=x, out=out: (
            cuda.linear(out, w, x)), lambda out=out: out, AT_ONCE)


if __name__ == "__main__":
    main()
