"""Block types and cache rows, bit for bit as gguf-py and numpy."""
import numpy as np
import pytest
from helpers import DEVICE, SIMULATED, choose, dequantize, kernels, set_scales
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from pydsa.backends import reference
from pydsa.backends.cpu import jit
from pydsa.backends.cpu.vectors.scalars import half
from pydsa.gguf.file import Tensor
from pydsa.quants import CACHE_TYPES, SUPPORTED, TYPES, cache_row_bytes

HALVES = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
SPECIAL = np.uint16([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00])
N_BLOCKS = choose((3,), (1, 2, 3, 5, 7, 32))


def same_bits(a, b):
    """Whether two float32 arrays hold the same bits, any NaN equal to any."""
    assert a.dtype == b.dtype == np.float32
    nan = np.isnan(b)
    return np.array_equal(np.isnan(a), nan) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def rows_of(tensor, ids):
    """Rows of a weight, by the backend's get_rows."""
    out = np.full((len(ids), tensor.shape[1]), np.nan, np.float32)
    kernels.get_rows(out, kernels.weight(tensor), np.asarray(ids, np.int32))
    return out


def random_bytes(kind, n_rows, n_blocks):
    """A tensor of random bytes.

    Every second block has a difficult scale: zero, subnormal, infinite or NaN.
    """
    rng = np.random.default_rng(n_blocks)
    dtype, size = TYPES[kind].dtype, TYPES[kind].size
    blocks = np.frombuffer(rng.bytes(n_rows * n_blocks * dtype.itemsize), dtype).copy()
    if dtype.names:
        set_scales(blocks[::2], kind, rng.choice(SPECIAL, len(blocks[::2])))
    if "e" in (dtype.names or ()):      # the subnormals 2^-128 and 2^-127, the least normal number, the largest scales
        blocks["e"][::2] = rng.choice(np.uint8([0, 1, 2, 254, 255]), len(blocks[::2]))
    data = blocks.view(np.uint8).reshape(n_rows, n_blocks * dtype.itemsize)
    data.flags.writeable = False
    return Tensor("w", kind, (n_rows, n_blocks * size), data)


@pytest.mark.parametrize("n_blocks", N_BLOCKS)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_dequantize(kind, n_blocks):
    n = choose(5, 97)
    tensor = random_bytes(kind, n, n_blocks)
    with np.errstate(all="ignore"):
        expected = dequantize(tensor.data, kind)
    ids = [n - 1, 0, n // 2, n // 2, *range(n)]
    assert same_bits(rows_of(tensor, ids), expected[ids])


@pytest.mark.parametrize("kind", SUPPORTED)
def test_vectors_are_unpacked_whole(kind):
    tensor = random_bytes(kind, 1, 3)._replace(shape=(3 * TYPES[kind].size,))
    values = kernels.weight(tensor._replace(data=tensor.data[0]))
    with np.errstate(all="ignore"):
        assert same_bits(values, dequantize(tensor.data[0], kind))
    assert not values.flags.writeable


def test_block_sizes():
    for kind in SUPPORTED:
        assert (TYPES[kind].size, TYPES[kind].dtype.itemsize) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


@jit.kernel
def extend_halves(out, bits):
    for i in range(bits.size):
        out[i] = half(bits[i])


def test_half():
    """Every float16 value, as a scalar and in rows of an F16 weight.

    Signs of zero and subnormals are included.
    """
    expected, found = HALVES.view(np.float16).astype(np.float32), np.empty(HALVES.size, np.float32)
    extend_halves(found, HALVES)
    assert same_bits(found, expected)
    tensor = Tensor("w", "F16", (4, 2**14), HALVES.view(np.uint8).reshape(4, -1))
    assert same_bits(rows_of(tensor, range(4)).reshape(-1), expected)


def floats_near_halves():
    """float32 values at and near every float16 value.

    The values themselves, their float32 neighbours, the ties between two of them with their neighbours, and values beyond float16.
    """
    finite = np.unique(HALVES.view(np.float16)[np.isfinite(HALVES.view(np.float16))]).astype(np.float32)
    ties = np.concatenate([(finite[1:] + finite[:-1]) / 2, np.float32([65520, -65520])])
    middle = np.concatenate([finite, ties, -finite[finite == 0]])
    others = np.float32([np.inf, -np.inf, np.nan, -np.nan, 3e38, -3e38, 65536, 1e-45, -1e-45, 1e-38, 2**-126, 2**-149, 2**-25])
    return np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)), others])


def floats_near_bf16():
    """Every upper half of a float32, with lower halves at and near a tie."""
    low = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return ((HALVES.astype(np.uint32) << 16)[:, None] | low).reshape(-1).view(np.float32)


def as_stored(kv_type, x):
    """float32 values as the bytes of a cache row.

    They are converted by numpy's float16 and gguf-py's BF16.
    """
    if kv_type == "bf16":
        return quantize(np.ascontiguousarray(x), GGMLQuantizationType.BF16)
    with np.errstate(over="ignore"):
        return x.astype({"f32": np.float32, "f16": np.float16}[kv_type], order="C").view(np.uint8)


@pytest.mark.parametrize("backend", [kernels, reference], ids=[DEVICE, "reference"])
@pytest.mark.parametrize("values", [floats_near_halves, floats_near_bf16])
@pytest.mark.parametrize("kv_type", [name for name, kind in CACHE_TYPES.items() if not kind.scaled])
def test_cache_write(kv_type, values, backend):
    if SIMULATED and backend is kernels:        # every thousandth value
        x = np.resize(values()[::1000], (3, 1003))[:, 2:]
    else:
        x = np.resize(values(), (3, 100_003))[:, 2:]        # columns of wider rows
    rows = backend.cache_rows(7, (x.shape[1],), kv_type)
    with np.errstate(invalid="ignore"):
        backend.cache_write(rows, x.astype(backend.FLOAT, copy=False), np.int64([5, 0, 2]))
    found, expected = backend.cache_bytes(rows)[[5, 0, 2]], as_stored(kv_type, x)
    kind = np.uint32 if kv_type == "f32" else np.uint16
    any_nan = np.isnan(x) & (kv_type != "bf16")     # the bits of a NaN are defined for bf16 only
    assert np.array_equal(found.view(kind)[~any_nan], expected.view(kind)[~any_nan])
    assert np.isnan(dequantize(found, kv_type.upper())[np.isnan(x)]).all()
    assert not backend.cache_bytes(rows)[[1, 3, 4, 6]].any()


def parts_of(stored, storage, widths):
    """The integers of cache rows, and the scale of each part."""
    n, width = CACHE_TYPES[storage].n_bytes, sum(widths)
    planes = [stored[:, i * width:(i + 1) * width].view(np.int8).astype(np.int32) for i in range(n)]
    return planes[0] if n == 1 else 256 * planes[0] + planes[1], stored[:, n * width:].copy().view(np.float32)


@pytest.mark.parametrize("backend", [kernels, reference], ids=[DEVICE, "reference"])
@pytest.mark.parametrize("storage, largest", [("i8", 127), ("i16", 32512)])
@pytest.mark.parametrize("widths", [(64, 32), (37, 21), (96,), (5,)])
def test_cache_write_of_integers(backend, storage, largest, widths):
    """Each part's largest magnitude becomes the largest integer.

    A value that is not finite makes the scale of its part so.
    """
    x = np.random.default_rng(0).standard_normal((5, sum(widths))).astype(np.float32)
    x[:, widths[0]:] *= 100
    x *= np.float32([[0], [1e-3], [1e3], [1e-20], [1]])
    rows = backend.cache_rows(7, widths, storage)
    backend.cache_write(rows, x.astype(backend.FLOAT), np.arange(5))
    assert backend.cache_bytes(rows).shape[1] == cache_row_bytes(storage, widths) and not backend.cache_bytes(rows)[5:].any()
    numbers, scales = parts_of(backend.cache_bytes(rows)[:5], storage, widths)
    for i, part in enumerate(np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])):
        top = np.abs(x[:, part]).max(axis=1)
        assert np.allclose(scales[:, i], top / largest, 1e-6, 0)
        assert (np.abs(numbers[1:, part]).max(axis=1) == largest).all() and not numbers[0].any()
        assert np.abs(numbers[:, part] * scales[:, i:i + 1] - x[:, part]).max() <= 0.5001 * scales[:, i].max()
    for value in (np.nan, np.inf, -np.inf):
        x[2, 3] = value
        backend.cache_write(rows, x.astype(backend.FLOAT), np.arange(5))
        scales = parts_of(backend.cache_bytes(rows)[:5], storage, widths)[1]
        assert not np.isfinite(scales[2, 0]) and np.isfinite(scales).sum() == scales.size - 1


@pytest.mark.parametrize("storage", [name for name, kind in CACHE_TYPES.items() if kind.scaled])
def test_backends_store_the_same_whole_numbers(storage):
    """Backends store the same integers, but for a few ties.

    A product that is rounded before an addition may round a tie the other way.
    """
    n = choose(10, 5000)
    x, stored = np.random.default_rng(1).standard_normal((n, 85)).astype(np.float32), []
    for backend in (kernels, reference):
        rows = backend.cache_rows(n, (53, 32), storage)
        backend.cache_write(rows, x.astype(backend.FLOAT), np.arange(n))
        stored.append(parts_of(backend.cache_bytes(rows), storage, (53, 32)))
    (numbers, scales), (expected, expected_scales) = stored
    assert np.array_equal(scales, expected_scales)
    assert np.abs(numbers - expected).max() <= 1 and np.mean(numbers != expected) < 1e-3


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
def test_cache_rows_are_read_as_written(kv_type):
    """Attention reads the values that a row's bytes stand for."""
    x = np.random.default_rng(0).standard_normal((1, 96)).astype(np.float32)
    rows = kernels.cache_rows(1, (64, 32), kv_type)
    kernels.cache_write(rows, x, np.zeros(1, np.int64))
    out = np.empty((1, 1, 64), np.float32)
    kernels.dense_attention(out, np.ones((1, 1, 96), np.float32), rows, np.zeros(1, np.int64), 1.0)
    if not CACHE_TYPES[kv_type].scaled:
        assert same_bits(out[0], dequantize(as_stored(kv_type, x), kv_type.upper())[:, :64])
    else:       # times a weight of 1, which is an integer too
        numbers, scales = parts_of(kernels.cache_bytes(rows), kv_type, (64, 32))
        assert np.allclose(out[0], numbers[:, :64] * scales[:, :1], 1e-6, 1e-6)


def test_offsets_beyond_2_gib():
    """Rows whose byte offset exceeds 32 signed bits.

    The system provides memory only for the rows that are written.
    """
    positions, x = np.array([2**22 - 1, 2**21, 7]), np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    rows = kernels.cache_rows(2**22, (512,), "f16")
    kernels.cache_write(rows, x, positions)
    out = np.empty((3, 1, 512), np.float32)
    kernels.sparse_attention(out, np.ones((3, 1, 512), np.float32), rows, positions[:, None].astype(np.int32), 1.0)
    assert np.array_equal(out[:, 0], x.astype(np.float16))
    weight = Tensor("w", "F16", (2**22, 512), rows.data)
    assert np.array_equal(rows_of(weight, positions), x.astype(np.float16))
