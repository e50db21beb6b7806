"""Files of log-probabilities: llama.cpp's, read and written, pydsa's own, and damaged ones."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

import pydsa
from pydsa import LogitsFileError
from pydsa.quality import Measurement
from pydsa.quality.logits_file import OWN, LlamaCppWriter, open_logits, scored

DATA = Path(__file__).parent / "data" / "perplexity"
LLAMA_CPP = json.loads((DATA / "llama_cpp.json").read_text())
BASE = DATA / "ds32-f32.logits"
TEXT = Path(pydsa.DEMO).with_name("notes.txt").read_text(encoding="utf-8").removesuffix("\n")
HEADER = 20 + 4 * 256


@pytest.fixture(scope="module")
def model(golden, load):
    return load(golden("ds32-f32")[0])


def write(model, path, n_top=None, stop_after=2):
    """Two chunks' log-probabilities in a file -> the Measurement."""
    measurement = Measurement([model], TEXT, 128, 2)
    run = measurement.run(path, n_top)
    for done in run:
        if done == stop_after:
            break
    run.close()
    return measurement


def test_what_llama_cpp_printed(golden, load):
    """Half of the keys, against llama.cpp's file: its own figures."""
    result = pydsa.perplexity(load(golden("ds32-f32")[0], dsa_top_k=32), TEXT, base=BASE)
    row, printed = result.row(), LLAMA_CPP["divergence"]
    for name, value in printed.items():
        rounding = 6e-5 if name == "correlation" else 1e-5 if name.startswith(("dp", "same")) else 1e-4
        assert row[name] == pytest.approx(value, rel=1e-5, abs=rounding), name
    assert len(printed) > 40 and result.kl.shape == (2, 63)


def test_what_is_written_is_what_llama_cpp_writes(model, tmp_path):
    """But for steps that round the other way.

    The sums of logits are in another order.
    """
    write(model, tmp_path / "base")
    mine, theirs = (np.fromfile(path, np.uint8) for path in (tmp_path / "base", BASE))
    assert mine.size == theirs.size and np.array_equal(mine[:HEADER], theirs[:HEADER])
    rows = [data[HEADER:].reshape(126, -1) for data in (mine, theirs)]
    numbers, steps = ([a[:, part].copy().view(dtype).astype(np.float64) for a in rows] for part, dtype in
                      ((slice(8), "<f4"), (slice(8, None), "<u2")))
    assert np.allclose(*numbers, rtol=1e-5) and abs(steps[0] - steps[1]).max() <= 1 and (steps[0] != steps[1]).mean() < 0.1


@pytest.mark.parametrize("n_vocab", [5, 6])
def test_odd_vocabularies(tmp_path, n_vocab):
    """Rows have a multiple of four bytes. A token 16 below the likeliest is at step 0, and equal logits have no steps."""
    from pydsa.quality.distributions import Rows, Threads
    logits = np.array([[0, -3, -40, -16, -1, 2][:n_vocab], [7] * n_vocab], np.float32)
    with Threads(1) as threads:
        rows, came = Rows(logits, threads), np.array([1, 2])
        writer = LlamaCppWriter(tmp_path / "base", np.array([[0, 1, 2, 1, 2]]), n_vocab)
        writer.add(rows, came, 0)
        writer.end_chunk()
        writer.close()
        with open_logits(tmp_path / "base") as reader:
            assert reader.tokens.tolist() == [[0, 1, 2, 1, 2]] and (tmp_path / "base").stat().st_size == 40 + 2 * 20
            log_probs, kl, same = reader.rows(0, 0, 2, threads).compared(rows, came)
    assert log_probs == pytest.approx(rows.of(came), abs=2e-4) and kl == pytest.approx(0, abs=1e-4) and same.all()


def test_own_form(model, tmp_path):
    """The tokens that came are exact, as is a comparison with the same model."""
    sizes = []
    (tmp_path / "5.part").write_text("another's")
    for n_top in (5, 512, 9999):        # the vocabulary has 512 tokens
        path = tmp_path / f"{n_top}"
        result = write(model, path, n_top).results[0]
        again = pydsa.perplexity(model, None, base=path)
        assert np.array_equal(again.base_log_probs, result.log_probs.astype(np.float32)) and again.same_top.all()
        assert np.array_equal(again.log_probs, result.log_probs) and abs(again.kl).max() < 1e-6
        sizes.append(path.stat().st_size)
    assert (tmp_path / "5.part").read_text() == "another's"
    header = sizes[0] - 2 * (4 * 128 + 63 * (4 + 8 * 5))
    assert len(OWN) + 8 < header < 400 and sizes[1] == sizes[2] == header + 2 + 2 * (4 * 128 + 63 * (4 + 8 * 512))


def test_likeliest_tokens_bound_the_divergence(golden, load, model, tmp_path):
    other = load(golden("ds32-f32")[0], dsa_top_k=32)
    whole = pydsa.perplexity([model, other], TEXT, 128, 2)[1]
    before = 0
    for n_top in (1, 20, 200, 512):
        write(model, tmp_path / "base", n_top)
        kl = pydsa.perplexity(other, TEXT, base=tmp_path / "base").kl
        assert (kl <= whole.kl + 1e-5).all() and before < kl.mean()
        before = kl.mean()
    assert kl == pytest.approx(whole.kl, abs=5e-5)


@pytest.mark.parametrize("n_top, kept", [(None, 0), (5, 1)])
def test_a_run_that_ends_early(model, tmp_path, n_top, kept):
    """Only pydsa's own form keeps the chunks that are complete."""
    write(model, tmp_path / "base", n_top, stop_after=1)
    assert len(list(tmp_path.iterdir())) == kept
    if kept:
        assert pydsa.perplexity(model, TEXT, base=tmp_path / "base").n_chunks == 1


def test_an_incomplete_file_of_llama_cpp(model, tmp_path):
    """llama-perplexity leaves one when it is stopped."""
    data = BASE.read_bytes()
    (tmp_path / "base").write_bytes(data[:-5])
    with open_logits(tmp_path / "base") as reader:
        assert (reader.n_chunks, reader.incomplete_of) == (1, 2)
    assert pydsa.perplexity(model, None, base=tmp_path / "base").n_tokens == 63


@pytest.fixture(scope="module")
def own(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "base"
    write(model, path, 3)
    return path.read_bytes()


def set_bytes(data, at, new):
    return data[:at] + new + data[at + len(new):]


LENGTH = len(OWN) + 8
DAMAGE = {
    "empty": lambda own, llama: b"", "another file": lambda own, llama: b"GGUF" * 10,
    "only a magic": lambda own, llama: llama[:8], "no whole chunk": lambda own, llama: llama[:HEADER + 50],
    "too long": lambda own, llama: llama + b"1234", "no chunks": lambda own, llama: set_bytes(llama, 16, bytes(4)),
    "negative sizes": lambda own, llama: set_bytes(llama, 8, b"\xff" * 12),
    "huge chunks": lambda own, llama: set_bytes(llama, 8, b"\xff\xff\xff\x7f"),
    "many chunks": lambda own, llama: set_bytes(llama, 16, b"\xff\xff\xff\x7f"),
    "a token beyond the vocabulary": lambda own, llama: set_bytes(llama, 40, b"\xff\xff\0\0"),
    "a scale that is no number": lambda own, llama: set_bytes(llama, HEADER, np.float32(np.nan).tobytes()),
    "a probability above 1": lambda own, llama: set_bytes(llama, HEADER + 4, np.float32(3).tobytes()),
    "own, only a magic": lambda own, llama: own[:len(OWN) + 3], "own, cut": lambda own, llama: own[:-1],
    "own, long header": lambda own, llama: set_bytes(own, len(OWN), b"\xff" * 8),
    "own, no JSON": lambda own, llama: set_bytes(own, LENGTH, b"x"),
    "own, a list": lambda own, llama: own[:LENGTH - 8] + (2).to_bytes(8, "little") + b"[]" + own[-100:],
    "own, more tokens than the vocabulary": lambda own, llama: own.replace(b'"n_top": 3', b'"n_top": 9999'),
    "own, a number as text": lambda own, llama: own.replace(b'"n_top": 3', b'"n_top": ""'),
    "own, nothing after the header": lambda own, llama: own[:own.index(b"}") + 1],
    "own, a token beyond the vocabulary": lambda own, llama: set_bytes(own, own.index(b"}") + 1, b"\xff\xff\0\0"),
    "own, an id beyond the vocabulary": lambda own, llama: set_bytes(own, own.index(b"}") + 1 + 4 * 128 + 4, b"\xff\xff\0\0"),
    "own, a probability above 1": lambda own, llama: set_bytes(own, own.index(b"}") + 1 + 4 * 128 + 16, np.float32(3).tobytes()),
    "own, no number": lambda own, llama: set_bytes(own, own.index(b"}") + 1 + 4 * 128, np.float32(np.nan).tobytes())}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(model, own, tmp_path, name):
    path = tmp_path / "base"
    path.write_bytes(DAMAGE[name](own, BASE.read_bytes()))
    with pytest.raises(LogitsFileError, match="incomplete|damaged|not a file of log-probabilities"):
        pydsa.perplexity(model, None, base=path)


def test_files_of_something_else(model, load, tmp_path):
    for options, message in ((dict(n_ctx=64), "chunks of 128 tokens, not 64"), (dict(stride=3), "no base")):
        with pytest.raises(pydsa.PydsaError, match=message):
            pydsa.perplexity(model, TEXT, base=BASE, **options)
    with pytest.raises(LogitsFileError, match="another text"):
        pydsa.perplexity(model, TEXT[200:], base=BASE)
    with pytest.raises(LogitsFileError, match="vocabulary of 512 tokens, the model's has 3072"):
        pydsa.perplexity(load(pydsa.DEMO, n_ctx=512), None, base=BASE)
    for path in (tmp_path, tmp_path / "missing", "zero\0byte"):
        with pytest.raises(LogitsFileError, match="cannot be read"):
            pydsa.perplexity(model, TEXT, base=path)


def test_files_that_cannot_be_written(model, tmp_path, monkeypatch):
    with pytest.raises(LogitsFileError, match="cannot be written"):
        write(model, tmp_path / "missing" / "base")
    with pytest.raises(LogitsFileError, match="this is no regular file"):
        write(model, os.devnull)
    monkeypatch.setattr("pydsa.quality.logits_file.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(LogitsFileError, match="of the disk are free"):
        write(model, tmp_path / "base")
    assert scored(128) == 63 and not list(tmp_path.iterdir())
    for options, message in ((dict(stride=5), "With a stride"), (dict(n_top=0), "n_top is 0")):
        with pytest.raises(pydsa.PydsaError, match=message):
            pydsa.perplexity(model, TEXT, 128, 2, save=tmp_path / "base", **options)
