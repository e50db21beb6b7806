"""`pydsa info --check`: what it finds, its hashes; gaps that loading warns of."""
import errno
import hashlib
import io
import json
import os
import threading
import time
import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_cases import gguf, split_kvs
from gguf_cases import info as gguf_info
from helpers import tensor

from pydsa import GGUFError
from pydsa.cli import main
from pydsa.gguf import check
from pydsa.gguf.file import Tensor, open_gguf
from pydsa.quants import TYPES

NAN, INFINITY = {"F32": 0x7FC00000, "BF16": 0x7FC0}, {"F32": 0xFF800000, "BF16": 0xFF80}     # of float16: 0x7E00, 0xFC00


def info(path, *more):
    return CliRunner().invoke(main, ["info", str(path), "--check", *more])


def damaged(path, target, changes):
    """A copy of a file with other bytes: {tensor name: function of its bytes, a writable array}."""
    data = bytearray(path.read_bytes())
    for offset, found in check.places(open_gguf(path))[0][1]:
        if found.name in changes:
            changes[found.name](np.frombuffer(data, np.uint8, found.data.nbytes, offset))
    target.write_bytes(data)
    return target


def set_nan(data):
    data[:4] = 0xFF


def set_zero(data):
    data[:] = 0


def test_a_sound_file(golden):
    path, _ = golden("ds32-q8_0")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result = info(path)
    assert result.exit_code == 0 and result.stdout == f"{digest}  {path}\n67 tensors, and no fault was found\n"
    report = json.loads(info(path, "-o", "json").stdout)
    assert report == {"files": [{"path": str(path), "bytes": path.stat().st_size, "sha256": digest}], "n_tensors": 67, "n_unknown": 0,
                      "tensors": [], "sound": True}


def test_damage_is_named(golden, tmp_path):
    path = damaged(golden("ds32-q8_0")[0], tmp_path / "model.gguf", {
        "blk.1.indexer.k_norm.weight": set_nan, "blk.0.attn_q_b.weight": set_nan, "blk.1.attn_output.weight": set_zero,
        "blk.1.indexer.k_norm.bias": set_zero})
    result = info(path)
    assert result.exit_code == 1 and "3 of 67 tensors are damaged" in result.stdout
    for line in ("tensor blk.1.indexer.k_norm.weight (F32) has 1 NaN\n", "tensor blk.0.attn_q_b.weight (Q8_0) has 1 NaN\n",
                 "tensor blk.1.attn_output.weight (Q8_0) has 68.0 KiB of zeros\n"):
        assert line in result.stdout
    result = info(path, "-o", "json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["sound"] and report["tensors"][0] == {
        "name": "blk.0.attn_q_b.weight", "type": "Q8_0", "file": str(path), "nan": 1, "infinite": 0, "zeros": 0, "checked": True}


@pytest.mark.parametrize("kind", TYPES)
def test_every_scale_of_every_type(kind):
    """... is looked at, in the last block as in the others."""
    sound, dtype = tensor(kind, 3, 2, 512), TYPES[kind].dtype
    assert check.faults(sound) == (0, 0, 0, True)
    fields = [name for name in dtype.names if name in ("d", "dmin", "m", "e")] if dtype.names else [None]
    assert fields or kind in ("NVFP4", "IQ1_M")     # scales without NaN; those of the next test
    for field in fields:
        for values, expected in ((NAN, (1, 0)), (INFINITY, (0, 1))):
            blocks = sound.data.copy().view(dtype)
            if field == "e":
                expected, value = (1, 0), 255
            else:
                value = values.get(kind, 0x7E00 if values is NAN else 0xFC00)
            target = blocks if field is None else blocks[field]
            target.view(f"<u{target.itemsize}" if field is None else target.dtype)[-1, -1, -1] = value
            assert check.faults(sound._replace(data=blocks.view(np.uint8)))[:2] == expected


def test_the_scattered_scale_of_iq1_m():
    sound = tensor("IQ1_M", 3, 512)
    for value, expected in ((0x7E00, (1, 0)), (0xFC00, (0, 1))):
        blocks = sound.data.copy().view(TYPES["IQ1_M"].dtype)
        for i in range(4):
            blocks["scales"][-1, -1, i] = blocks["scales"][-1, -1, i] & 0xFFF | (value >> 4 * i & 0xF) << 12
        assert check.faults(sound._replace(data=blocks.view(np.uint8)))[:2] == expected


def test_pieces(monkeypatch, golden, tmp_path):
    """Tensors that are read in many pieces give the same."""
    path = damaged(golden("ds32-q8_0")[0], tmp_path / "model.gguf", {"blk.1.attn_output.weight": set_zero, "output.weight": set_nan})
    whole = check.check_files(open_gguf(path))
    monkeypatch.setattr(check, "CHUNK", 1000)
    assert check.check_files(open_gguf(path)) == whole and len(whole["tensors"]) == 2


def test_parts(tmp_path):
    """Each has a hash; the first has no tensor, as llama.cpp can write it."""
    bodies = [gguf(split_kvs(0, 3, 2)), *(gguf(split_kvs(i, 3, 2), [gguf_info(f"t{i}", [2, 2])], values.tobytes())
                                          for i, values in ((1, np.ones(4, "<f4")), (2, np.full(4, np.inf, "<f4"))))]
    paths = [tmp_path / f"model-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for path, body in zip(paths, bodies):
        path.write_bytes(body)
    report = check.check_files(open_gguf(paths[0]))
    assert [entry["sha256"] for entry in report["files"]] == [hashlib.sha256(body).hexdigest() for body in bodies]
    assert [(entry["name"], entry["infinite"], entry["file"]) for entry in report["tensors"]] == [("t2", 4, str(paths[2]))]


def test_a_stretch_of_zeros(monkeypatch):
    monkeypatch.setattr(check, "STRETCH", 1024)
    data = np.ones((64, 256), np.uint8)
    data[8:17] = 0
    hole = Tensor("blk.0.ffn_up.weight", "I8", (64, 256), data)
    assert check.faults(hole) == (0, 0, 2048, False)
    assert not check.faults(hole._replace(name="output.weight"))        # less than half


def test_gaps_are_warned_of(golden, tmp_path, monkeypatch):
    path = golden("ds32-q8_0")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.warn_of_gaps(open_gguf(path))

    def end(data):
        data[len(data) // 4 * 3:] = 0
    gap = damaged(path, tmp_path / "gap.gguf", {"blk.1.attn_output.weight": end, "output.weight": end})
    with pytest.warns(UserWarning, match=r"tensor 'blk.1.attn_output.weight' ends in zeros: .* `pydsa info --check`"):
        check.warn_of_gaps(open_gguf(gap))
    gap = damaged(path, tmp_path / "gap.gguf", {"blk.1.attn_output.weight": set_zero, "output.weight": set_zero})
    with pytest.warns(UserWarning, match="2 tensors, the first of them 'output.weight', end in zeros"):
        check.warn_of_gaps(open_gguf(gap))


def test_a_disk_that_cannot_be_read_when_loading(golden, monkeypatch):
    class Broken(io.FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(check, "_opened", Broken)
    with pytest.raises(GGUFError, match=r"the file cannot be read at byte [\d]+ \(Input/output error\)"):
        check.warn_of_gaps(open_gguf(golden("ds32-q8_0")[0]))


def test_a_file_that_becomes_shorter(golden, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(golden("ds32-q8_0")[0].read_bytes())
    file = open_gguf(path)
    places = check.places(file)
    with open(path, "r+b") as opened:
        opened.truncate(path.stat().st_size - 1000)
    with pytest.raises(GGUFError, match="became shorter while it was read"):
        check.warn_of_gaps(file)
    with pytest.raises(GGUFError, match="became shorter while it was read"), open(path, "rb", buffering=0) as opened:
        check._read(path, opened, memoryview(bytearray(file.n_bytes)))
    path.unlink()
    with pytest.raises(GGUFError, match="cannot be opened again"):
        check._check_part(*places[0], lambda n: None, threading.Event())


def test_an_error_of_one_file_ends_all(golden, monkeypatch):
    """... at once: a file of a terabyte beside it is not read to its end."""
    def read(path, file, buffer):
        if path == "damaged":
            raise GGUFError("damaged")
        met.append(time.sleep(0.1))
        return buffer
    met, file = [], open_gguf(golden("ds32-q8_0")[0])
    (path, tensors), = check.places(file)
    monkeypatch.setattr(check, "_read", read)
    monkeypatch.setattr(check, "_opened", lambda name: open(path, "rb"))
    monkeypatch.setattr(check, "places", lambda file: [(path, tensors), ("damaged", tensors)])
    with pytest.raises(GGUFError, match="damaged"):
        check.check_files(file)
    assert len(met) < len(tensors) / 2


def test_an_interrupt_ends_the_reading(golden, monkeypatch):
    def slow(*args):
        ready.wait()
        return read(*args)

    def interrupt(*args):
        ready.set()
        raise KeyboardInterrupt
    read, ready = check._read, threading.Event()
    monkeypatch.setattr(check, "_read", slow)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        check.check_files(open_gguf(golden("ds32-q8_0")[0]), interrupt)
    assert threading.active_count() == before
