"""Block types: unpacked bit for bit as gguf-py does, cache rows rounded as numpy and gguf-py do."""
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from pydsa.backends import cpu, reference
from pydsa.gguf_file import Tensor
from pydsa.quants import KV_TYPES, SUPPORTED, block_type
from pydsa.quants.block import half

HALVES = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
SPECIAL = np.uint16([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00])
N_BLOCKS = (1, 2, 3, 5, 7, 32)


def same_bits(a, b):
    """Whether two float32 arrays hold the same bits; any NaN is as good as another."""
    assert a.dtype == b.dtype == np.float32
    nan = np.isnan(b)
    return np.array_equal(np.isnan(a), nan) and np.array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


def rows_of(tensor, ids):
    """Rows of a weight, through the CPU backend's get_rows."""
    out = np.full((len(ids), tensor.shape[1]), np.nan, np.float32)
    cpu.get_rows(out, cpu.weight(tensor), np.asarray(ids, np.int32))
    return out


def random_bytes(kind, n_rows, n_blocks):
    """A tensor of random bytes, every second of its blocks with scales that need care: zeros, subnormals, infinities, NaN."""
    rng = np.random.default_rng(n_blocks)
    dtype, size = block_type(kind).dtype, block_type(kind).size
    blocks = np.frombuffer(rng.bytes(n_rows * n_blocks * dtype.itemsize), dtype).copy()
    for field in {"d", "dmin", "m"} & set(dtype.names or ()):
        blocks[field][::2] = rng.choice(SPECIAL, len(blocks[::2]))
    if "e" in (dtype.names or ()):      # 2^-128 and 2^-127, which are subnormal, the least normal number, the largest scales
        blocks["e"][::2] = rng.choice(np.uint8([0, 1, 2, 254, 255]), len(blocks[::2]))
    data = blocks.view(np.uint8).reshape(n_rows, n_blocks * dtype.itemsize)
    data.flags.writeable = False
    return Tensor("w", kind, (n_rows, n_blocks * size), data)


@pytest.mark.parametrize("n_blocks", N_BLOCKS)
@pytest.mark.parametrize("kind", SUPPORTED)
def test_dequantize(kind, n_blocks):
    tensor = random_bytes(kind, 97, n_blocks)
    with np.errstate(all="ignore"):
        expected = dequantize(tensor.data, GGMLQuantizationType[kind])
    ids = [96, 0, 50, 50, *range(97)]
    assert same_bits(rows_of(tensor, ids), expected[ids])


@pytest.mark.parametrize("kind", SUPPORTED)
def test_vectors_are_unpacked_whole(kind):
    tensor = random_bytes(kind, 1, 3)._replace(shape=(3 * block_type(kind).size,))
    values = cpu.weight(tensor._replace(data=tensor.data[0]))
    with np.errstate(all="ignore"):
        assert same_bits(values, dequantize(tensor.data[0], GGMLQuantizationType[kind]))
    assert not values.flags.writeable


def test_block_sizes():
    for kind in SUPPORTED:
        assert (block_type(kind).size, block_type(kind).dtype.itemsize) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def test_half():
    """Every value, scalar by scalar and as rows of an F16 weight; signs of zero and subnormals too."""
    expected = HALVES.view(np.float16).astype(np.float32)
    assert same_bits(np.array([half(bits) for bits in HALVES], np.float32), expected)
    tensor = Tensor("w", "F16", (4, 2**14), HALVES.view(np.uint8).reshape(4, -1))
    assert same_bits(rows_of(tensor, range(4)).reshape(-1), expected)


def floats_near_halves():
    """Every half, the float32 just beside it, the ties between neighbours and what is just beside those; and what has no half."""
    finite = np.unique(HALVES.view(np.float16)[np.isfinite(HALVES.view(np.float16))]).astype(np.float32)
    ties = np.concatenate([(finite[1:] + finite[:-1]) / 2, np.float32([65520, -65520])])
    middle = np.concatenate([finite, ties, -finite[finite == 0]])
    others = np.float32([np.inf, -np.inf, np.nan, -np.nan, 3e38, -3e38, 65536, 1e-45, -1e-45, 1e-38, 2**-126, 2**-149, 2**-25])
    return np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)), others])


def floats_near_bf16():
    """Every upper half of a float32, with lower halves at, beside and far from a tie."""
    low = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return ((HALVES.astype(np.uint32) << 16)[:, None] | low).reshape(-1).view(np.float32)


def as_stored(kv_type, x):
    """float32 -> the bytes of a cache row, by numpy's float16 and gguf-py's BF16."""
    if kv_type in ("bf16", "q8_0"):
        return quantize(np.ascontiguousarray(x), GGMLQuantizationType[KV_TYPES[kv_type]])
    with np.errstate(over="ignore"):
        return x.astype({"f32": np.float32, "f16": np.float16}[kv_type], order="C").view(np.uint8)


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("values", [floats_near_halves, floats_near_bf16])
@pytest.mark.parametrize("kv_type", [name for name in KV_TYPES if name != "q8_0"])
def test_cache_write(kv_type, values, backend):
    x = np.resize(values(), (3, 100_003))[:, 2:]        # columns of wider rows
    rows = backend.cache_rows(7, x.shape[1], kv_type)
    with np.errstate(invalid="ignore"):
        backend.cache_write(rows, x.astype(backend.FLOAT, copy=False), np.int64([5, 0, 2]))
    found, expected = backend.cache_bytes(rows)[[5, 0, 2]], as_stored(kv_type, x)
    kind = np.uint32 if kv_type == "f32" else np.uint16
    any_nan = np.isnan(x) & (kv_type != "bf16")     # which NaN it is, is told of bf16 only
    assert np.array_equal(found.view(kind)[~any_nan], expected.view(kind)[~any_nan])
    assert np.isnan(dequantize(found, GGMLQuantizationType[KV_TYPES[kv_type]])[np.isnan(x)]).all()
    assert not backend.cache_bytes(rows)[[1, 3, 4, 6]].any()


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
def test_cache_write_of_blocks(backend):
    """Q8_0 as gguf-py rounds it; index keys the same with one scale a row. What is not finite stays so, in its block."""
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    x[:, 32:64] *= np.float32([[0], [1e-3], [1e3], [1e-20], [1]])
    blocks, rows = backend.cache_rows(5, 96, "q8_0"), backend.cache_rows(5, 32, "i8")
    for cache, values in ((blocks, x), (rows, x[:, 32:64])):
        backend.cache_write(cache, values.astype(backend.FLOAT), np.arange(5))
    expected = as_stored("q8_0", x)
    assert np.array_equal(backend.cache_bytes(blocks), expected)
    stored = backend.cache_bytes(rows)
    assert np.array_equal(stored[:, :32], expected[:, 36:68])
    assert np.array_equal(stored[:, 32:].copy().view(np.float32)[:, 0], np.abs(x[:, 32:64]).max(axis=1) / np.float32(127))
    for value in (np.nan, np.inf, -np.inf):
        x[2, 40] = value
        backend.cache_write(blocks, x.astype(backend.FLOAT), np.arange(5))
        found = dequantize(backend.cache_bytes(blocks), GGMLQuantizationType.Q8_0)
        assert not np.isfinite(found[2, 32:64]).any() and np.isfinite(found[2, :32]).all() and np.isfinite(found[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_cache_rows_are_read_as_written(kv_type):
    """What attention sees of a row is what gguf-py makes of its bytes."""
    x = np.random.default_rng(0).standard_normal((1, 96)).astype(np.float32)
    rows = cpu.cache_rows(1, 96, kv_type)
    cpu.cache_write(rows, x, np.zeros(1, np.int64))
    out = np.empty((1, 1, 96), np.float32)
    cpu.dense_attention(out, np.ones((1, 1, 96), np.float32), rows, np.zeros(1, np.int64), 1.0)
    expected = dequantize(as_stored(kv_type, x), GGMLQuantizationType[KV_TYPES[kv_type]])
    if kv_type == "q8_0":       # 18 bits, of which pairs keep 16
        assert np.allclose(out[0], expected, 2 ** -16, 0)
    else:
        assert same_bits(out[0], expected)


def test_offsets_beyond_2_gib():
    """Rows so far into a cache that a 32-bit offset would be negative; the system gives memory only for those that are written."""
    positions, x = np.array([2**22 - 1, 2**21, 7]), np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    rows = cpu.cache_rows(2**22, 512, "f16")
    cpu.cache_write(rows, x, positions)
    out = np.empty((3, 1, 512), np.float32)
    cpu.sparse_attention(out, np.ones((3, 1, 512), np.float32), rows, positions[:, None].astype(np.int32), 1.0)
    assert np.array_equal(out[:, 0], x.astype(np.float16))
    weight = Tensor("w", "F16", (2**22, 512), rows.data)
    assert np.array_equal(rows_of(weight, positions), x.astype(np.float16))
