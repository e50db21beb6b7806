"""Time and check one token's matrix products on a GPU, at V3.2's shapes.

    python tools/gpu_products.py
    python tools/gpu_products.py --type Q2_K --type IQ2_XXS

For each matrix: microseconds of a product, gigabytes of weights a second, and the NMSE of the first rows against float64. Activations are
rounded before. Products are launched one after the other, over so many matrices that none is in the second-level cache.
"""
from typing import NamedTuple

import click
import numpy as np

from pydsa.backends import cuda, reference
from pydsa.backends.cuda.linear import head_tiles
from pydsa.backends.cuda.moe import pair_tiles
from pydsa.backends.cuda.variants import kernels
from pydsa.gguf_file import Tensor
from pydsa.quants import SUPPORTED, TYPES

COLD = 128 << 20        # bytes of all matrices of a shape: more than a second-level cache holds
RANDOM_ROWS = 64        # that are different; they are repeated
LAUNCHES = 24


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


def random_tensor(kind, shape, rng):
    """A tensor of a GGUF type [matrices, n_out, n_in] of random blocks."""
    matrices, n_out, n_in = shape
    dtype = TYPES[kind].dtype
    if dtype.names is None:
        values = rng.standard_normal((RANDOM_ROWS, n_in)).astype(np.float32)
        rows = values if kind == "F32" else values.astype(np.float16) if kind == "F16" else (values.view(np.uint32) >> 16).astype(np.uint16)
        rows = rows.view(np.uint8)
    else:
        blocks = np.frombuffer(rng.bytes(RANDOM_ROWS * n_in // TYPES[kind].size * dtype.itemsize), dtype).copy()
        for field in sorted({"d", "dmin", "m"} & set(dtype.names)):
            blocks[field] = (rng.random(len(blocks)) / 25).astype(np.float16).view(blocks[field].dtype)
        if kind == "IQ1_M":     # four bits of the scale above each of four others
            scales = (rng.random(len(blocks)) / 25).astype(np.float16)
            blocks["scales"] = blocks["scales"] & 0x0FFF | (scales.view(np.uint16)[:, None] >> np.uint16([0, 4, 8, 12]) & 15) << 12
        if "e" in dtype.names:
            blocks["e"] = rng.integers(120, 124, len(blocks))
        rows = blocks.view(np.uint8).reshape(RANDOM_ROWS, -1)
    repeats = -(-matrices * n_out // RANDOM_ROWS)
    return Tensor("w", kind, shape, np.tile(rows, (repeats, 1))[:matrices * n_out].reshape(matrices, n_out, -1))


def measure(product, kind, rng, launches=LAUNCHES, cold=COLD):
    """Seconds, bytes a second and NMSE of a product."""
    tensor = random_tensor(kind, (product.matrices, product.n_out, product.n_in), rng)
    n_bytes = tensor.data.nbytes // product.matrices * product.used
    weights = [cuda.weight(tensor) for _ in range(min(launches, -(-cold // n_bytes)))]
    x = rng.standard_normal((product.used if product.own else 1, product.n_in)).astype(np.float32)
    ids = np.sort(rng.permutation(product.matrices)[:product.used]).astype(np.int32)
    if product.used == product.matrices:
        tiles = head_tiles(1, product.matrices)
    else:
        tiles = pair_tiles(cuda.upload(ids[None]), product.matrices, 1 if product.own else product.used)
    op, out = kernels("linear", weights[0], True), cuda.empty((product.used, product.n_out), np.float32)
    packed = op.pack(cuda.upload(x))

    def chain():
        for i in range(launches):
            op.matmul(out, weights[i % len(weights)], packed, tiles)
    chain()     # compiles
    seconds = cuda.gpu.time_each([chain])[0] / launches
    few = [Tensor("w", kind, (min(product.n_out, RANDOM_ROWS), product.n_in), tensor.data[i, :RANDOM_ROWS]) for i in ids]
    expected = np.stack([reference.weight(w).astype(np.float64) @ x[i if product.own else 0] for i, w in enumerate(few)])
    error = ((cuda.fetch(out)[:, :RANDOM_ROWS] - expected) ** 2).sum() / (expected ** 2).sum()
    return seconds, n_bytes / seconds, error


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--type", "kinds", multiple=True, type=click.Choice(SUPPORTED), default=("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "BF16"),
              help="types of weights  [Q4_K, Q6_K, Q8_0, Q5_K, Q4_0, BF16]")
@click.option("--small", is_flag=True, help="small matrices, to try the tool")
def main(kinds, small):
    rng, errors = np.random.default_rng(0), []
    click.echo(f"{'':28} {'us':>8} {'GB/s':>8} {'NMSE':>9}")
    for kind in kinds:
        for product in SMALL if small else PRODUCTS:
            if product.n_in % TYPES[kind].size == 0:
                seconds, rate, error = measure(product, kind, rng, *((2, 1) if small else ()))
                errors.append(error)
                click.echo(f"{kind:8} {product.name:19} {seconds * 1e6:8.1f} {rate / 1e9:8.0f} {error:9.1e}")
    if not all(error < 1e-7 for error in errors):       # NaN, too
        raise SystemExit(f"the NMSE is up to {np.max(errors):.1e}, expected less than 1e-7: a kernel computes something else")


if __name__ == "__main__":
    main()
