"""The weights of a checkpoint as float32, whatever it stores them as.

Beside a matrix NAME there may be NAME_scale_inv (FP8 with blocks of 128 x 128), NAME_scale and NAME_global_scale (compressed-tensors),
NAME_scale and NAME_scale_2 (NVFP4 of ModelOpt); or the matrix is NAME_packed. weights(checkpoint) puts them together.
"""
import numpy as np

from pydsa.conversion.fields import Fields
from pydsa.errors import CheckpointError, UnsupportedModelError
from pydsa.gguf.file import quote

METHODS = ("fp8", "compressed-tensors", "modelopt")
OF_WEIGHTS = ("_scale_inv", "_scale_2", "_global_scale", "_scale", "_shape", "_zero_point", "_g_idx")     # longer ends first
OF_ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".activation_scale")
FLOATS = ("F64", "F32", "F16", "BF16")
NVFP4_GROUP, MXFP4_GROUP = 16, 32
FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e4m3():
    """The 256 values of F8_E4M3: no infinities, two NaN."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0 ** -9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def _e8m0():
    """The 256 values of F8_E8M0: powers of two and a NaN."""
    values = 2.0 ** (np.arange(256) - 127.0)
    values[255] = np.nan
    return values.astype(np.float32)


CODES = {"F8_E4M3": _e4m3(), "F8_E8M0": _e8m0()}


def to_float32(data, dtype):
    """An array of checkpoint.DTYPES[dtype] -> float32 of the same shape."""
    if dtype in CODES:
        return np.take(CODES[dtype], data)
    if dtype == "F8_E5M2":
        return (data.astype("<u2") << 8).view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (data.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):        # an infinity is met later, with the tensor's name
        return data.astype(np.float32, copy=False)


class Weight:
    """A tensor of the model, with what is stored beside it.

    name, shape: of the matrix itself. read(first, last): its rows as float32 [last - first, ...]. scales: the Stored of its scales.
    """

    def __init__(self, name, stored, shape=None, scales=()):
        self.name, self.stored, self.shape, self.scales = name, stored, stored.shape if shape is None else shape, tuple(scales)

    @property
    def path(self):
        """The file, for messages."""
        return self.stored.path

    def read(self, first=0, last=None):
        """Rows as a new float32 array."""
        return to_float32(self.stored.read(first, last), self.stored.dtype)

    def check_scales(self):
        """Raise CheckpointError if a scale is NaN or infinite."""
        for scale in self.scales:
            values = to_float32(scale.read(), scale.dtype)
            if not np.isfinite(values).all():
                at = np.argwhere(~np.isfinite(values))[0].tolist()
                raise CheckpointError(f"{scale.path}: {quote(scale.name)} has a scale that is {values[tuple(at)]} at {at}, expected "
                                      "numbers: the file is damaged, get it again.")


class Scaled(Weight):
    """Codes of 8 bits times a scale for each block of rows and columns.

    block: (rows, columns) of a block. The matrix has one axis more where experts are stored together; then the scales have it too.
    """

    def __init__(self, name, stored, scale, block):
        super().__init__(name, stored, scales=[scale])
        self._block, n, k = block, *stored.shape[-2:]
        wanted = (*stored.shape[:-2], -(-n // block[0]), -(-k // block[1]))
        self._scale = scale._replace(shape=wanted)
        forms = {wanted, wanted[:-1] if wanted[-1] == 1 else wanted, *([(), (1,)] if wanted == (1, 1) else [])}
        if scale.shape not in forms:
            raise CheckpointError(f"{scale.path}: {quote(scale.name)} has the shape {list(scale.shape)}, expected {list(wanted)} for "
                                  f"blocks of {block[0]} x {block[1]} in {list(stored.shape)}.")

    def read(self, first=0, last=None):
        """Rows as a new float32 array."""
        values = super().read(first, last)
        rows, columns = self._block
        if values.ndim == 3:
            scale = to_float32(self._scale.read(first, last), self._scale.dtype)
            begin = 0
        else:
            last = self.shape[0] if last is None else last
            scale = to_float32(self._scale.read(first // rows, -(-last // rows)), self._scale.dtype)
            begin = first % rows
        scale = scale.repeat(rows, axis=-2)[..., begin:begin + values.shape[-2], :] if rows > 1 else scale
        values *= scale.repeat(columns, axis=-1)[..., :values.shape[-1]]
        return values


class FourBit(Weight):
    """NVFP4 and MXFP4: two codes a byte, a scale for each 16 or 32 of them.

    factor: Stored of the factor of the whole tensor, or None; divide: whether it divides.
    """

    def __init__(self, name, stored, scale, factor, divide):
        shape = (*stored.shape[:-1], 2 * stored.shape[-1])
        self._group = MXFP4_GROUP if scale.dtype == "F8_E8M0" else NVFP4_GROUP
        super().__init__(name, stored, shape, [scale] if factor is None else [scale, factor])
        wanted = (*shape[:-1], shape[-1] // self._group)
        if scale.shape != wanted or shape[-1] % self._group or (factor is None) != (self._group == MXFP4_GROUP):
            raise CheckpointError(f"{scale.path}: {quote(scale.name)} of {scale.dtype} has the shape {list(scale.shape)}, expected "
                                  f"{list(wanted)}, a scale for each {self._group} weights"
                                  + ("." if self._group == MXFP4_GROUP else ", and a factor of the whole tensor beside it."))
        self._scale, self._factor, self._divide = scale, factor, divide

    def read(self, first=0, last=None):
        """Rows as a new float32 array."""
        codes = self.stored.read(first, last)
        values = np.empty((*codes.shape[:-1], codes.shape[-1], 2), np.float32)
        values[..., 0], values[..., 1] = FP4[codes & 15], FP4[codes >> 4]
        scale = to_float32(self._scale.read(first, last), self._scale.dtype)
        if self._factor is not None:
            factor = to_float32(self._factor.read(), self._factor.dtype).reshape(-1)
            scale = scale / factor if self._divide else scale * factor
        values = values.reshape(*scale.shape, self._group)
        values *= scale[..., None]
        return values.reshape(*codes.shape[:-1], -1)


class PackedIntegers(Weight):
    """compressed-tensors' pack-quantized: integers of 4 or 8 bits in int32."""

    def __init__(self, name, stored, scale, shape, zero_point, n_bits):
        super().__init__(name, stored, shape, [scale])
        n, k = shape
        self._n_bits, self._scale, self._zero = n_bits, scale, zero_point
        per_word = 32 // n_bits
        groups = scale.shape[-1] if len(scale.shape) == 2 else 0
        zeros = (-(-n // per_word), groups)
        if stored.shape != (n, -(-k // per_word)) or not groups or scale.shape[0] != n or k % groups or (
                zero_point is not None and zero_point.shape != zeros):
            raise CheckpointError(f"{stored.path}: {quote(stored.name)} has the shape {list(stored.shape)}, its scales {list(scale.shape)}"
                                  f", expected those of a matrix {list(shape)} of {n_bits} bits in groups of columns.")

    def _unpack(self, words, n, axis):
        """Integers of unsigned words, n along an axis."""
        shifts = np.arange(0, 32, self._n_bits, dtype=np.uint32)
        words = words.view("<u4")
        shape = (1, -1, 1) if axis == 0 else (1, 1, -1)
        codes = (np.expand_dims(words, axis + 1) >> shifts.reshape(shape)) & np.uint32(2 ** self._n_bits - 1)
        codes = codes.reshape((-1, words.shape[1]) if axis == 0 else (words.shape[0], -1))
        return (codes[:n] if axis == 0 else codes[:, :n]).astype(np.float32)

    def read(self, first=0, last=None):
        """Rows as a new float32 array."""
        last = self.shape[0] if last is None else last
        k, groups = self.shape[1], self._scale.shape[1]
        values = self._unpack(self.stored.read(first, last), k, 1).reshape(-1, groups, k // groups)
        if self._zero is None:
            values -= 2 ** (self._n_bits - 1)
        else:
            values -= self._unpack(self._zero.read(), self.shape[0], 0)[first:last, :, None]
        values *= to_float32(self._scale.read(first, last), self._scale.dtype)[..., None]
        return values.reshape(-1, k)


def weights(checkpoint):
    """({name: Weight}, names that are only for activations) of a Checkpoint.

    A matrix has the name that it would have without quantization. Raises CheckpointError or UnsupportedModelError for what is
    contradictory or unknown.
    """
    tensors, companions, found, left_out = checkpoint.tensors, {}, {}, []
    reader = _Reader(checkpoint)
    for name in tensors:
        end = next((end for end in OF_WEIGHTS if name.endswith(end) and not name.endswith(OF_ACTIVATIONS)), None)
        base = name.removesuffix(end) if end else None
        if base is not None and (base in tensors or f"{base}_packed" in tensors):
            companions.setdefault(base, {})[end] = tensors[name]
    beside = {stored.name for parts in companions.values() for stored in parts.values()}
    for name, stored in tensors.items():
        if name in beside:
            continue
        if name.endswith(OF_ACTIVATIONS):
            left_out.append(name)
            continue
        base = name.removesuffix("_packed")
        if base in found:
            raise CheckpointError(f"{stored.path}: there are both {quote(base)} and {quote(base + '_packed')}, expected one of them.")
        found[base] = reader.weight(base, stored, dict(companions.get(base, {})), packed=base != name)
    return found, left_out


class _Reader:
    """Makes a Weight of what a checkpoint stores of it."""

    def __init__(self, checkpoint):
        config = checkpoint.config.fields("quantization_config", default=Fields({}, checkpoint.config.path))
        method = config.string("quant_method", default=None)
        if method not in (None, *METHODS):
            raise UnsupportedModelError(f"{config.path}: the weights are quantized by {quote(method)}, expected {', '.join(METHODS)}, or "
                                        "none: get the model's own files.")
        self._block, self._n_bits = config.integers("weight_block_size", default=None), None
        for key, group in config.fields("config_groups", default=Fields({}, config.path)).values.items():
            if isinstance(group, dict) and isinstance(group.get("weights"), dict):
                part = Fields(group["weights"], config.path, f"quantization_config.config_groups.{key}.weights.")
                self._block = part.integers("block_structure", default=self._block)
                self._n_bits = part.integer("num_bits", 1, 16, default=self._n_bits)
                if self._block is None and part.string("strategy", default=None) == "group":
                    self._block = [1, part.integer("group_size", 1)]
        if self._block is not None and (len(self._block) != 2 or min(self._block) < 1):
            raise CheckpointError(f"{config.path}: the blocks of the weights are {self._block}, expected two numbers, rows and columns.")

    def weight(self, name, stored, beside, packed):
        """The Weight of a tensor, with {end of a name: Stored} beside it."""
        parts = {end: beside.pop(end, None) for end in OF_WEIGHTS}
        scale = parts["_scale_inv"] or parts["_scale"]
        given = {end for end, part in parts.items() if part is not None}
        if stored.dtype in FLOATS and not packed and not given:
            return Weight(name, stored)
        for part in filter(None, (scale, parts["_scale_2"], parts["_global_scale"])):
            if part.dtype not in (*FLOATS, "U8", *CODES):
                raise CheckpointError(f"{part.path}: {quote(part.name)} is of {part.dtype}, expected scales of a float type.")
        if scale is not None and scale.dtype == "U8":       # MXFP4 and MXFP8: exponents
            scale = scale._replace(dtype="F8_E8M0")
        if stored.dtype == "U8" and scale is not None and given <= {"_scale", "_scale_2", "_global_scale"}:
            factor = parts["_scale_2"] or parts["_global_scale"]
            if factor is None or np.prod(factor.shape, dtype=int) == 1:
                return FourBit(name, stored, scale, factor, divide=parts["_global_scale"] is not None)
        if stored.dtype == "I32" and packed and scale is not None and given <= {"_scale", "_shape", "_zero_point"} and (
                self._n_bits in (4, 8) and parts["_shape"] is not None and len(stored.shape) == 2):
            return PackedIntegers(name, stored, scale, _shape(parts["_shape"]), parts["_zero_point"], self._n_bits)
        if stored.dtype in ("F8_E4M3", "F8_E5M2", "I8") and not packed and len(given) == 1 and scale is not None and (
                len(stored.shape) in (2, 3)):
            return Scaled(name, stored, scale, self._blocks_of(stored, scale))
        raise UnsupportedModelError(f"{stored.path}: {quote(stored.name)} of {stored.dtype} {list(stored.shape)} "
                                    + (f"with {', '.join(sorted(given))} beside it " if given else "without scales ")
                                    + "is stored in a way that pydsa does not know, expected a float type, FP8, NVFP4, MXFP4 or packed "
                                    "integers with their scales.")

    def _blocks_of(self, stored, scale):
        """(rows, columns) that share a scale."""
        experts, n, k = stored.shape[:-2], *stored.shape[-2:]
        if scale.shape in ((), (1,)):
            return n, k
        if scale.shape in ((*experts, n), (*experts, n, 1)):
            return 1, k
        if self._block is None:
            raise CheckpointError(f"{scale.path}: {quote(scale.name)} has the shape {list(scale.shape)} beside {list(stored.shape)}, but "
                                  "the configuration has no weight_block_size, expected the rows and columns that share a scale.")
        return tuple(self._block)


def _shape(stored):
    """The shape that a tensor weight_shape holds."""
    if stored.dtype not in ("I32", "I64") or stored.shape != (2,):
        raise CheckpointError(f"{stored.path}: {quote(stored.name)} is {stored.dtype} {list(stored.shape)}, expected two integers.")
    shape = tuple(stored.read().tolist())
    if not all(0 < n < 2**31 for n in shape):
        raise CheckpointError(f"{stored.path}: {quote(stored.name)} is {list(shape)}, expected the rows and columns of a matrix.")
    return shape
