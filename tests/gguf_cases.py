"""Small GGUF files built byte by byte, sound and malformed."""
import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value % 2**64)


def text(value, length=None):
    """A GGUF string; `length` replaces the true length."""
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def kv(key, type_id, payload):
    return text(key) + u32(type_id) + payload


def array(key, type_id, n, payload):
    return kv(key, ARRAY, u32(type_id) + u64(n) + payload)


def alignment(value):
    return kv("general.alignment", U32, u32(value))


def info(name, ne, type_id=0, offset=0, n_dims=None):
    """A tensor info; ne is in ggml's order."""
    dims = b"".join(map(u64, ne))
    return text(name) + u32(len(ne) if n_dims is None else n_dims) + dims + u32(type_id) + u64(offset)


def gguf(kvs=(), infos=(), data=b"", magic=b"GGUF", version=3, n_tensors=None, n_kv=None, align=32):
    """A whole file; the counts are the true ones unless given."""
    n_tensors = len(infos) if n_tensors is None else n_tensors
    n_kv = len(kvs) if n_kv is None else n_kv
    header = magic + u32(version) + u64(n_tensors) + u64(n_kv) + b"".join(kvs) + b"".join(infos)
    return header + bytes(-len(header) % align) + data if infos else header


def split_kvs(number, count, n_tensors):
    return [kv("split.no", U16, struct.pack("<H", number)), kv("split.count", U16, struct.pack("<H", count)),
            kv("split.tensors.count", I32, struct.pack("<i", n_tensors))]


def sample():
    """A sound file with a value of every type and three tensors.

    The tensors are [2, 4] F32, [1] I8 and [3, 32] Q8_0.
    """
    kvs = [
        kv("general.architecture", STRING, text("deepseek32")), alignment(32),
        kv("u8", U8, b"\xff"), kv("i8", I8, b"\xff"), kv("u16", U16, b"\xfe\xff"), kv("i16", I16, b"\xfe\xff"),
        kv("i32", I32, struct.pack("<i", -7)), kv("u64", U64, u64(-1)), kv("i64", I64, u64(-1)),
        kv("f32", F32, struct.pack("<f", 0.5)), kv("f64", F64, struct.pack("<d", 1e-6)),
        kv("nan", F32, struct.pack("<f", float("nan"))), kv("yes", BOOL, b"\1"), kv("no", BOOL, b"\0"),
        array("tokens", STRING, 3, text("a") + text("") + text("世界")), array("big", U64, 1, u64(-1)),
        array("types", I32, 3, struct.pack("<3i", 1, -2, 3)), array("scores", F32, 2, struct.pack("<2f", 0.5, -1)),
        array("flags", BOOL, 3, b"\1\0\1"), array("none", U32, 0, b""),
    ]
    infos = [info("a", [4, 2]), info("b", [1], 24, 32), info("c.weight", [32, 3], 8, 64)]
    data = struct.pack("<8f", *range(8)) + b"\x05" + bytes(31) + bytes(range(102))
    return gguf(kvs, infos, data)


ONE = [info("a", [4, 2])]
EIGHT_FLOATS = bytes(32)
HUGE = 2**63 - 64
MALFORMED = {    # name: (file, pattern of the error)
    # header
    "magic": (gguf(magic=b"GGML"), "starts with b'GGML', expected b'GGUF'"),
    "not a GGUF": (b"version https://git-lfs.github.com/spec/v1", "not a GGUF file, but a pointer of Git LFS"),
    "web page": (b"<!DOCTYPE html>", "not a GGUF file, but a web page"),
    "version 0": (gguf(version=0), "version is 0, expected 2 or 3"),
    "version 1": (gguf(version=1), "version is 1, expected 2 or 3"),
    "version 4": (gguf(version=4), "version is 4, expected 2 or 3"),
    "version huge": (gguf(version=2**32 - 1), "version is 4294967295"),
    "byte-swapped": (gguf(version=3 << 24), r"byte-swapped \(big-endian\), expected little-endian"),
    "n_tensors -1": (gguf(n_tensors=-1), "number of tensors is -1, expected at most"),
    "n_tensors min": (gguf(n_tensors=2**63), "number of tensors is -9223372036854775808"),
    "n_tensors huge": (gguf(n_tensors=2**63 - 1), "number of tensors is 9223372036854775807, expected at most"),
    "n_tensors one too many": (gguf(infos=ONE, data=EIGHT_FLOATS, n_tensors=2), "name of tensor 1 is 0 bytes long"),
    "n_tensors does not fit": (gguf(n_tensors=1), "number of tensors is 1, expected at most 0"),
    "n_kv -1": (gguf(n_kv=-1), "number of key-value pairs is -1, expected at most"),
    "n_kv huge": (gguf(n_kv=2**62), "number of key-value pairs is 4611686018427387904"),
    "n_kv one too many": (gguf([alignment(32)], n_kv=2), "length of key 1 takes 8 bytes"),
    # keys
    "key length -1": (gguf([text("a", -1) + bytes(20)]), "key 0 is 18446744073709551615 bytes long, expected 1"),
    "key length > remaining": (gguf([text("a", 60) + bytes(20)]), "key 0 takes 60 bytes"),
    "key empty": (gguf([kv("", U8, b"\1\0")]), "key 0 is 0 bytes long"),
    "key not UTF-8": (gguf([kv(b"\xff\xfe", U8, b"\1")]), "key 0 .* is not text, expected valid UTF-8"),
    "key too long": (gguf([kv("k" * 65536, U8, b"\1")]), "key 0 is 65536 bytes long, expected 1 to 65535"),
    "key twice": (gguf([kv("x", U8, b"\1"), kv("x", U16, b"\1\0")]), "the key 'x' is there twice"),
    "long key twice": (gguf([kv("k" * 65535, U8, b"\1")] * 2), r"the key 'k+\.\.\.' is there twice"),
    "key with escapes": (gguf([kv("\x1b[2J\n", U8, b"\1")] * 2), r"the key '\\x1b\[2J\\n' is there twice"),
    # values
    "type 13": (gguf([kv("x", 13, u64(0))]), "'x' is of the unknown type 13, expected 0 to 12"),
    "type huge": (gguf([kv("x", 2**32 - 1, u64(0))]), "'x' is of the unknown type 4294967295"),
    "bool 2": (gguf([kv("x", BOOL, b"\2")]), "'x' is a bool with the value 2, expected 0 or 1"),
    "bool array 255": (gguf([array("x", BOOL, 2, b"\0\xff")]), "'x' is an array of bools with the value 255"),
    "string > 1 GiB": (gguf([kv("x", STRING, text("", 2**30 + 1))]), "'x' is 1073741825 bytes long, expected 0 to"),
    "string > remaining": (gguf([kv("x", STRING, text("abc", 4))]), "'x' takes 4 bytes from byte 45 on"),
    "string length -1": (gguf([kv("x", STRING, text("abc", -1))]), "'x' is 18446744073709551615 bytes long"),
    "string not UTF-8": (gguf([kv("x", STRING, text(b"a\xc0\xaf"))]), "'x' .* is not text, expected valid UTF-8"),
    "string surrogate": (gguf([kv("x", STRING, text(b"\xed\xa0\x80"))]), "'x' .* is not text"),
    "array > 2^30": (gguf([array("x", U8, 2**30 + 1, b"")]), "length of 'x' is 1073741825, expected at most 0"),
    "array length -1": (gguf([array("x", U32, -1, b"1234")]), "length of 'x' is -1"),
    "array size overflow": (gguf([array("x", U64, 2**61 + 1, u64(1))]), "length of 'x' is 2305843009213693953"),
    "array > remaining": (gguf([array("x", U16, 3, b"12345")]), "length of 'x' is 3, expected at most 2, as 5 bytes"),
    "array of strings > remaining": (gguf([array("x", STRING, 2, text("abcd"))]), "length of 'x' is 2"),
    "array string too long": (gguf([array("x", STRING, 2, text("", 9) + text(""))]), "string 0 of 'x' goes on behind"),
    "array string length -1": (gguf([array("x", STRING, 1, text("", -1))]), "string 0 of 'x' goes on behind"),
    "array string cut": (gguf([array("x", STRING, 2, text("123456789"))]), "string 1 of 'x' goes on behind byte 66"),
    "array string not UTF-8": (gguf([array("x", STRING, 2, text("a") + text(b"\x80"))]), "string 1 .* is not text"),
    "array nested": (gguf([array("x", ARRAY, 1, u32(U8) + u64(1) + b"1")]), "'x' is an array of arrays"),
    "array of unknown": (gguf([array("x", 77, 1, u64(1))]), "'x' is an array of the unknown type 77"),
    "alignment 0": (gguf([alignment(0)]), "general.alignment is 0, expected a power of two from 8 to 1048576"),
    "alignment 13": (gguf([alignment(13)]), "general.alignment is 13"),
    "alignment 4": (gguf([alignment(4)]), "general.alignment is 4"),
    "alignment huge": (gguf([alignment(2**31)]), "general.alignment is 2147483648"),
    "alignment i32": (gguf([kv("general.alignment", I32, u32(32))]), "general.alignment is of type 5, expected 4"),
    "alignment string": (gguf([kv("general.alignment", STRING, text("32"))]), "general.alignment is of type 8"),
    "alignment array": (gguf([array("general.alignment", U32, 1, u32(32))]), "general.alignment is of type 9"),
    # tensor infos
    "name of 64 bytes": (gguf(infos=[info("n" * 64, [1])]), "name of tensor 0 is 64 bytes long, expected 1 to 63"),
    "name empty": (gguf(infos=[info("", [1, 1])]), "name of tensor 0 is 0 bytes long"),
    "name not UTF-8": (gguf(infos=[info(b"\xff", [1])]), "name of tensor 0 .* is not text"),
    "name twice": (gguf(infos=[info("a", [8]), info("a", [8], offset=32)], data=bytes(64)), "'a' is there twice"),
    "name with escapes": (gguf(infos=[info("\x1b[2J", [0])]), r"tensor '\\x1b\[2J' has the dimensions"),
    "n_dims 0": (gguf(infos=[info("a", [])], data=bytes(4)), "tensor 'a' has 0 dimensions, expected 1 to 4"),
    "n_dims 5": (gguf(infos=[info("a", [1] * 5)], data=bytes(4)), "tensor 'a' has 5 dimensions, expected 1 to 4"),
    "n_dims huge": (gguf(infos=[info("a", [1], n_dims=2**32 - 1)]), "tensor 'a' has 4294967295 dimensions"),
    "dimension 0": (gguf(infos=[info("a", [4, 0])]), r"tensor 'a' has the dimensions \[4, 0\], expected at least 1"),
    "dimension -1": (gguf(infos=[info("a", [4, -1])]), r"tensor 'a' has the dimensions \[4, -1\]"),
    "elements overflow": (gguf(infos=[info("a", [2**31] * 3)], data=bytes(32)), "tensor 'a' ends at byte 396140812571"),
    "elements wrap to 4": (gguf(infos=[info("a", [2**62, 4])], data=bytes(32)), "tensor 'a' ends at byte"),
    "bytes overflow": (gguf(infos=[info("a", [2**61, 2])], data=bytes(32)), "tensor 'a' ends at byte"),
    "bytes and padding wrap": (gguf(infos=[info("a", [4, 2**30 - 1, 2**30 + 1])], data=bytes(32)), "'a' ends at"),
    "two of 2^63-64": (gguf(infos=[info("a", [HUGE], 24), info("b", [HUGE], 24, HUGE)]), "tensor 'a' ends at byte"),
    "row not of whole blocks": (gguf(infos=[info("a", [33, 32], 2)], data=bytes(2000)), "Q4_0 has rows of 33, .* 32"),
    "row shorter than a block": (gguf(infos=[info("a", [32, 8], 12)], data=bytes(999)), "Q4_K has rows of 32, .* 256"),
    "first offset not 0": (gguf(infos=[info("a", [8], offset=32)], data=bytes(96)), "'a' has the offset 32, expected 0"),
    "offset not aligned": (gguf(infos=[info("a", [4]), info("b", [4], offset=16)], data=bytes(64)), "16, expected 32"),
    "offset not the sum": (gguf(infos=[info("a", [8]), info("b", [8], offset=64)], data=bytes(99)), "64, expected 32"),
    "overlap": (gguf(infos=[info("a", [16]), info("b", [8], offset=32)], data=bytes(99)), "32, expected 64"),
    "offset huge": (gguf(infos=[info("a", [8], offset=-32)], data=EIGHT_FLOATS), "has the offset 18446744073709551584"),
    "alignment of offsets": (gguf([alignment(64)], [info("a", [8]), info("b", [8], offset=32)], bytes(64), align=64),
                             "'b' has the offset 32, expected 64: .* padded to 64"),
    # data
    "no data": (gguf(infos=ONE), "tensor 'a' ends at byte 128, but the file at 96: it is incomplete"),
    "data one byte short": (gguf(infos=ONE, data=bytes(31)), "tensor 'a' ends at byte 128, but the file at 127"),
    "second tensor cut": (gguf(infos=[info("a", [8]), info("b", [8], offset=32)], data=bytes(63)), "'b' ends at"),
}
MALFORMED.update({
    f"type id {i}": (gguf(infos=[info("a", [256], i)], data=bytes(2048)), f"'a' has the type id {i}, which is unknown")
    for i in (4, 5, 31, 32, 33, 36, 37, 38, 43, 2**32 - 1)})
