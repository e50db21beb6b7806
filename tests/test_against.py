"""pydsa faithful --against: choices and logits of other implementations, right and wrong."""
import numpy as np
import pytest
from helpers import random_ids

import pydsa
from pydsa import faithful
from pydsa.backends import reference
from pydsa.faithful import against

IDS = random_ids(90)        # top_k is 12
RIGHT_SCORES, RIGHT_WRITE = reference.indexer_scores, reference.cache_write


def load(path):
    return pydsa.load(path, device="reference", n_ctx=128, n_ubatch=40, kv_type="f32")


@pytest.fixture(scope="module")
def run(small_model):
    """A model, its logits, and the choices of its layers, int32 [90, 12]."""
    model = load(small_model(n_layer=2))
    session = model.session()
    with session.record(routing=False) as recording:
        logits = session.logits(IDS)
    return model, logits, {il: recording.selection[il] for il in range(2)}


def compare(run, path, **arrays):
    """What is found about a file with these arrays: (verdict, text)."""
    if arrays:
        np.savez(path, **arrays)
    report = faithful.check(run[0], IDS, samples=64, against=against.read(path))
    found = report.findings[-1]
    assert found.name.startswith("against") and (found.name in report.wrong) == (found.verdict == "wrong")
    return found.verdict, found.measured


def selections(choices):
    return {f"selection.{il}": choice for il, choice in choices.items()}


def test_the_same_choice_in_any_order_and_with_padding_anywhere(run, tmp_path):
    order = np.random.default_rng(0).permutation(12)
    verdict, text = compare(run, tmp_path / "theirs.npz", **selections({il: choice[:, order] for il, choice in run[2].items()}))
    assert verdict == "right" and "100.0 % of our keys in layers 0 to 1" in text


def test_a_recording_and_positions_in_the_middle(run, tmp_path):
    session = run[0].session()
    with session.record(path=tmp_path / "theirs.npz"):
        session.prefill(IDS)
    assert compare(run, tmp_path / "theirs.npz") == ("right", f"{tmp_path / 'theirs.npz'} has 100.0 % of our keys in layers 0 to 1")
    verdict, text = compare(run, tmp_path / "part.npz", positions=np.arange(40, 80), **{"selection.1": run[2][1][40:80]})
    assert verdict == "right" and "100.0 % of our keys in layer 1" in text


def test_coarse_index_keys_are_no_fault(run, small_model, tmp_path, monkeypatch):
    """Keys that are off by a hundredth, as those of 8 bits are."""
    def write(cache, x, positions):
        index_keys = x.shape[1] == 32
        RIGHT_WRITE(cache, x * (1 + 0.01 * np.random.default_rng(0).standard_normal(x.shape)) if index_keys else x, positions)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "cache_write", write)
        session = load(small_model(n_layer=2)).session()
        with session.record(routing=False) as recording:
            session.prefill(IDS)
    verdict, text = compare(run, tmp_path / "theirs.npz", **selections({0: recording.selection[0]}))
    assert verdict == "right" and "as where index keys are rounded to 8 bits" in text


def without_relu(out, q, w, keys, positions, scale):
    RIGHT_SCORES(out, q, w, keys, positions, scale)
    n_kv = positions[-1] + 1
    dots = scale * np.einsum("th,thd,sd->ts", w, q, reference._floats(keys[:n_kv]))
    out[:, :n_kv] = np.where(out[:, :n_kv] > -np.inf, dots, -np.inf)


def test_another_implementation_that_leaves_out_relu(run, small_model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(reference, "indexer_scores", without_relu)
        session = load(small_model(n_layer=2)).session()
        with session.record(routing=False) as recording:
            session.prefill(IDS)
        theirs = {il: recording.selection[il] for il in range(2)}
    verdict, text = compare(run, tmp_path / "theirs.npz", tokens=IDS, **selections(theirs))
    first = next(t for t in range(90) if not np.array_equal(theirs[0][t], run[2][0][t]))
    assert verdict == "wrong" and f"the first other key is in layer 0 at position {first}" in text
    assert "it is what comes out where ReLU is left out (100.0 % of those keys)" in text


def moved(choice):
    return np.where(choice >= 0, choice + 1, -1)


@pytest.mark.parametrize("change, sentence", [
    (moved, "positions are one too great (100.0 % of those keys)"),
    (lambda choice: choice[:, 1:], "of its choices have another number of keys"),
    (lambda choice: np.where(choice == choice[:, :1], choice[:, 1:2], choice), "keys out of order"),
    (lambda choice: choice[::-1], "layer 0, with ")], ids=["moved", "fewer", "twice", "rows reversed"])
def test_other_choices(run, tmp_path, change, sentence):
    verdict, text = compare(run, tmp_path / "theirs.npz", **selections({il: change(choice) for il, choice in run[2].items()}))
    assert verdict == "wrong" and sentence in text and "layer 0" in text


def test_logits(run, tmp_path):
    model, logits, _ = run
    rounded = logits + 0.01 * logits.std() * np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
    offset = rounded - np.log(np.exp(rounded).sum(axis=1, keepdims=True))       # log-probabilities are as good
    np.save(tmp_path / "theirs.npy", offset)
    verdict, text = compare(run, tmp_path / "theirs.npy")
    assert verdict == "right" and "of 90 tokens" in text
    verdict, text = compare(run, tmp_path / "moved.npz", logits=logits[1:])
    assert verdict == "wrong" and "each row is that of the token one later, with the same likeliest token at 98.9 %" in text
    dense = pydsa.load(model.metadata.path, device="reference", n_ctx=128, kv_type="f32", attention="dense").logits(IDS)
    verdict, text = compare(run, tmp_path / "dense.npz", logits=dense)
    assert verdict == "wrong" and text.endswith("So the choice of keys differs")
    verdict, text = compare(run, tmp_path / "nan.npz", logits=np.full_like(logits, np.nan))
    assert verdict == "wrong" and "error is nan" in text
    slightly = logits + np.where(np.arange(90)[:, None] < 12, 0, 0.01) * logits.std() * np.sin(np.arange(300))
    verdict, text = compare(run, tmp_path / "slightly.npz", logits=slightly)
    assert verdict == "unclear" and "by a fault or by the rounding of index keys" in text


@pytest.mark.parametrize("arrays, message", [
    ({"x": np.zeros(3)}, "there is neither a selection nor logits, only x"),
    ({"selection.0": np.zeros((3, 4))}, r"selection.0 is float64 \[3, 4\]"),
    ({"selection.0": np.zeros((3, 4), int), "positions": np.arange(2)}, r"positions is int64 \[2\], with 3 tokens"),
    ({"selection.0": np.zeros((3, 4), int), "positions": np.array([2, 1, 0])}, "do not ascend"),
    ({"selection.0": np.zeros((3, 4), int), "tokens": np.zeros((3, 1), int)}, "tokens is"),
    ({"logits": np.zeros((3, 4), int)}, "logits is int64"), ({"logits": np.float32(3)}, r"positions is int64 \[0\], with 0 tokens"),
    ({"selection.0": np.zeros((0, 4), int)}, "with 0 tokens"), ({"selection_0": np.zeros((3, 4), int)}, "only selection_0"),
    ({"selection.0": np.array([None])}, "is damaged")])
def test_files_that_are_no_choice(tmp_path, arrays, message):
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(pydsa.PydsaError, match=message):
        against.read(tmp_path / "theirs.npz")


@pytest.mark.parametrize("arrays, message", [
    ({"selection.2": np.zeros((3, 4), int)}, "a choice for layer 2, expected layers 0 to 1"),
    ({"logits": np.zeros((3, 4))}, "logits of 4 tokens, expected 300"),
    ({"selection.0": np.zeros((3, 4), int), "tokens": np.array([IDS[0], 299, 299])}, "the token at position 1 is 299"),
    ({"selection.0": np.zeros((3, 4), int), "positions": np.arange(200, 203)}, "its positions begin at 200, and the text has 90 tokens")])
def test_files_of_other_models_and_texts(run, tmp_path, arrays, message):
    np.savez(tmp_path / "theirs.npz", **arrays)
    with pytest.raises(pydsa.PydsaError, match=message):
        faithful.check(run[0], IDS, samples=32, against=against.read(tmp_path / "theirs.npz"))


def test_files_that_cannot_be_read(tmp_path):
    np.savez(tmp_path / "cut.npz", **{"selection.0": np.zeros((300, 12), int)})
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:len(data) // 2])
    for name, message in ("cut.npz", "cannot be read"), ("none.npz", "No such file"), ("", "cannot be read"):
        with pytest.raises(pydsa.PydsaError, match=message):
            against.read(tmp_path / name)


def test_the_tokens_of_a_file_are_the_text(run, tmp_path):
    np.savez(tmp_path / "theirs.npz", **{"selection.0": run[2][0], "tokens": np.array(IDS)})
    theirs = against.read(tmp_path / "theirs.npz")
    assert faithful.text_ids(run[0].metadata.path, None, theirs, 4096) == IDS
