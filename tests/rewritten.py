"""Copies of a GGUF file with other metadata and other tensors."""
import gguf
import numpy as np

T = gguf.GGUFValueType
INT, FLOAT, BOOL, TEXT = T.UINT32, T.FLOAT32, T.BOOL, T.STRING


def rewrite(source, path, keys={}, drop=(), tensors=lambda tensor: [tensor]):
    """Write a copy of the file `source` to `path`, and return the path.

    keys: {key: (type, value)}, or (T.ARRAY, element type, value). drop: keys to leave out. tensors(tensor) -> what replaces a tensor of
    gguf-py's reader: a list of tensors and of (name, array of its rows' bytes or numbers, type).
    """
    reader = gguf.GGUFReader(source)
    arch = keys.get("general.architecture", (TEXT, reader.get_field("general.architecture").contents()))[1]
    writer = gguf.GGUFWriter(path, arch)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in drop and key not in keys:
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind == T.ARRAY else None)
    for key, (kind, *element, value) in keys.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, *element)
    for tensor in reader.tensors:
        for new in tensors(tensor):
            name, data, kind = new if isinstance(new, tuple) and not hasattr(new, "tensor_type") else (new.name, new.data, new.tensor_type)
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def each(*functions):
    """A function for rewrite() that applies several one after the other.

    They must be about different tensors.
    """
    def tensors(tensor):
        for function in functions:
            new = function(tensor)
            if new != [tensor]:
                return new
        return [tensor]
    return tensors


def joined(source, first, second, name, join):
    """A function for rewrite(): pairs of tensors become one.

    In every block, the tensors *first* and *second* are replaced by *name*, with the data join(first, second).
    """
    data = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}

    def tensors(tensor):
        if second in tensor.name:
            return []
        if first in tensor.name:
            return [(tensor.name.replace(first, name), join(tensor.data, data[tensor.name.replace(first, second)]), tensor.tensor_type)]
        return [tensor]
    return tensors


def fused_experts(source):
    """A function for rewrite(): ffn_gate_up_exps, as the converter fuses it."""
    return joined(source, "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", lambda gate, up: np.concatenate([gate, up], axis=1))


def whole_kv_b(source):
    """A function for rewrite(): attn_kv_b, as the converter of 2024 wrote it.

    The weights must be of a float type.
    """
    def join(k_b, v_b):         # [head, rank, nope] and [head, v, rank] -> [head * (nope + v), rank]
        as_stored = k_b.dtype
        if as_stored == np.uint8:       # bytes of bfloat16
            k_b, v_b = k_b.view(np.uint16), v_b.view(np.uint16)
        both = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
        return both.reshape(-1, both.shape[-1]).view(as_stored)
    return joined(source, "attn_k_b", "attn_v_b", "attn_kv_b", join)


def with_factors(ends=(".scale", ".scale"), but=(), seed=0):
    """A function for rewrite(): matrices get factors beside them.

    Floats are divided by these, so that the products stay the same; quantized matrices are not. ends: of the names of the factors of a
    matrix, and of experts' matrices. Those with a part of `but` in their names have none.
    """
    def tensors(tensor):
        matrix = tensor.data.ndim > 1 and not any(part in tensor.name for part in but)
        if not matrix:
            return [tensor]
        experts = "exps" in tensor.name
        rng = np.random.default_rng([seed, *tensor.name.encode()])
        factors = (2.0 ** rng.integers(-3, 4, tensor.data.shape[0] if experts else 1)).astype(np.float32)      # exact
        data = tensor.data
        if data.dtype == np.float32:
            data = data / (factors[:, None, None] if experts else factors)
        else:
            factors = factors ** 0.25       # other than powers of two, and of one size
        name = tensor.name.removesuffix(".weight") + ends[experts]
        return [(tensor.name, data, tensor.tensor_type), (name, factors, gguf.GGMLQuantizationType.F32),
                (tensor.name.removesuffix("weight") + "input_scale", factors, gguf.GGMLQuantizationType.F32)]
    return tensors
