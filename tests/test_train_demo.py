"""Training the demo model: texts, forward pass, stages, checkpoints.

Torch's forward pass is compared with pydsa's.
"""
import json

import numpy as np
import pytest

import pydsa
from pydsa.chat import BOS, encode_chat
from tools.demo import data, notes
from tools.make_model import ModelSpec

WIDTHS = dict(n_layer=3, n_embd=64, n_head=4, n_lora_q=64, n_lora_kv=64, n_nope=8, n_rot=16, n_v=16, n_ff=64, n_ff_exp=32, n_expert=4,
              n_expert_groups=0, expert_weights_scale=1.0, indexer_n_head=8, indexer_head_size=32, indexer_top_k=24, n_ctx=256,
              rope_scaling="absent", tied_output=True, n_vocab=1800)
PROSE = ["A name refers to an object. Names are introduced by name binding operations.", "Values are compared by their types."] * 3


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    data.train_tokenizer(path, PROSE, WIDTHS["n_vocab"], digits=3)
    return data.Vocabulary(path)


@pytest.fixture(scope="module")
def train():
    pytest.importorskip("torch")
    from tools.demo import train
    return train


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    """The folder of a run of two steps for each stage, with its checkpoint."""
    path = tmp_path_factory.mktemp("run")
    run(train, path, phases(train))
    return path


def phases(train):
    stages = (("dense", 0), ("indexer", 32), ("sparse", 32))
    return tuple(train.Phase(stage, 64, 2, 2, 1e-3, 1e-4, (1, 0, 0, 0), kl_tokens=n) for stage, n in stages)


def run(train, path, phases):
    training = train.Training(path, 3, phases, spec=ModelSpec(**WIDTHS))
    return training, list(training.run(save_every=1, log_every=1))


def test_what_can_be_known_has_weight(vocabulary):
    ids, weights, positions = data.batch(0, 0, vocabulary, PROSE, 128, 4, (1, 0, 0, 0), 1000)
    assert ids.shape == (4, 129) and weights.shape == positions.shape == (4, 128)
    assert (ids[:, 0] == vocabulary.ids[BOS]).all() and (weights == notes.ANSWER).any(axis=1).all()
    assert (np.diff(positions) >= 1).all() and positions.max() < 1000
    for row, row_weights in zip(ids, weights):      # the tokens of an answer occur in the notes too
        for at in np.flatnonzero(row_weights == notes.ANSWER):
            assert row[at + 1] in row[:at]


@pytest.mark.parametrize("kind", notes.KINDS)
def test_texts_are_long_enough(vocabulary, kind):
    for n in (40, 300):
        parts = kind(np.random.default_rng(n), n, vocabulary.count, PROSE)
        assert vocabulary.count(parts) == len(vocabulary.lay_out(parts)[0]) >= n


def test_prose_is_split_by_topic():
    topics = {f"topic {i:02d}": f"The {i}th topic tells how names are bound and what they refer to.\n\n   code = 1" for i in range(24)}
    prose, held_out = notes.split_topics(notes.paragraphs(topics))
    assert len(prose) == 22 and len(held_out) == 2 and not set(prose) & set(held_out)


def test_stages_train_what_they_should(train, folder):
    first, last = train.Training(folder / "new", 3, spec=ModelSpec(**WIDTHS)), train.Training(folder, 3, spec=ModelSpec(**WIDTHS))
    rows = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["dense"] * 2 + ["indexer"] * 2 + ["sparse"] * 2 and last.step == 6
    assert all(np.isfinite(list(row.values())[4:]).all() for row in rows) and all(0 < row["mass"] < 1 for row in rows[2:])
    assert all((first.weights[name] != w).any() for name, w in last.weights.items())


def test_the_indexer_alone(train, folder):
    """The indexer's stage changes the indexer only.

    A stage without the indexer's loss leaves the indexer unchanged.
    """
    dense, indexer, _ = phases(train)
    for phase, changes in ((dense, False), (indexer, True)):
        training = train.Training(folder / phase.stage, 3, (phase,), spec=ModelSpec(**WIDTHS))
        before = {name: w.clone() for name, w in training.weights.items()}
        list(training.run())
        for name, w in training.weights.items():
            assert bool((w != before[name]).any()) == (train.is_indexer(name) == changes), name


def test_a_run_that_stopped_goes_on_as_if_it_had_not(train, folder, tmp_path):
    for n in (1, 2, 3):     # stops after each stage
        training, _ = run(train, tmp_path, phases(train)[:n])
    whole = train.Training(folder, 3, spec=ModelSpec(**WIDTHS))
    assert all((training.weights[name] == w).all() for name, w in whole.weights.items())


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_torch_and_pydsa_agree(train, folder, tmp_path, attention):
    """The prompt is four times as long as top_k."""
    import torch

    from tools.demo.export import export
    from tools.demo.net import forward, logits
    training = train.Training(folder, 3, spec=ModelSpec(**WIDTHS))
    path = export(tmp_path / "demo.gguf", training.spec, training.weights, training.vocabulary, "F32")
    model = pydsa.load(path, threads=1, kv_type="f32", attention=attention)
    messages = [{"role": "user", "content": "The code of the amber lantern is 4812.\n" * 10 + "\nWhat is the code of the amber lantern?"}]
    ids = encode_chat(model.tokenizer, messages)
    assert ids[-2:] == [training.vocabulary.ids[text] for text in ("<｜Assistant｜>", "</think>")] and len(ids) > 96
    with torch.no_grad():
        x, _, _ = forward(training.weights, training.spec, torch.tensor([ids]), attention=attention)
        expected = logits(training.weights, x)[0].numpy()
    error = ((model.logits(ids) - expected) ** 2).sum(axis=1) / (expected ** 2).sum(axis=1)
    assert np.median(error) < 1e-10     # a choice between near equals may flip


def test_the_vocabularies_are_the_same(train, folder, tmp_path):
    from tools.demo.export import export
    training = train.Training(folder, 3, spec=ModelSpec(**WIDTHS))
    tokenizer = pydsa.load_tokenizer(export(tmp_path / "demo.gguf", training.spec, training.weights, training.vocabulary))
    for text in ("The code of the amber lantern is 4812.\n\nWhat", "naïve 12 + 7 = 19", notes.TALK[0][1]):
        assert tokenizer.encode(text) == training.vocabulary.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
