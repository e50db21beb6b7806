"""tools/needle.py on a small random model.

Its documents, random choices of keys, the mass that a choice holds, its tables and refusals.
"""
import json

import numpy as np
import pytest
from click.testing import CliRunner

import pydsa
from tools import needle

PROSE = ["A name refers to an object. Names are introduced by name binding operations."] * 3 + ["Values are compared by their types."]


def count(text):
    return len(text.split())


@pytest.mark.parametrize("n_tokens,n_facts", [(400, 3), (1000, 20), (200, 20)])
def test_documents_keep_to_their_length(n_tokens, n_facts):
    text, facts = needle.document(np.random.default_rng(0), count, n_tokens, n_facts, PROSE)
    lines = text.splitlines()
    places = [lines.index(f"The code of the {name} is {code}.") for name, code in facts]
    assert len(facts) == n_facts and places == sorted(places) and places[0] == 0
    assert n_tokens - 40 < count(text) <= max(n_tokens, 10 * n_facts)


def test_random_choices_are_choices():
    chosen, positions = np.zeros((3, 4), np.int32), np.array([1, 3, 90])
    needle.choose_at_random(np.random.default_rng(0), chosen, positions)
    assert chosen[0].tolist() == [0, 1, -1, -1] and chosen[1].tolist() == [0, 1, 2, 3]
    assert (np.diff(chosen[2]) > 0).all() and 0 <= chosen[2].min() and chosen[2].max() <= 90


def masses(path, **options):
    """The shares that a watcher measures in a prompt of 60 tokens."""
    model = pydsa.load(path, n_ctx=64, threads=1, kv_type="f32", attention="sparse", n_ubatch=16, **options)
    watcher = needle.Watcher(weigh=True)
    needle.run(model.session(), list(range(60)), watcher, model.n_ubatch)
    return watcher.shares


def test_mass(small_model):
    shares = masses(small_model())
    assert len(shares) == 3 * 48 and 0 < min(shares) and max(shares) < 1      # top_k is 12; there are three layers
    assert np.allclose(masses(small_model(), dsa_top_k=59), 1, atol=0.3) and np.mean(masses(small_model(), dsa_top_k=50)) > np.mean(shares)


def test_mass_of_a_single_key(small_model):
    """A single chosen key holds at least the mean and at most all."""
    shares = masses(small_model(), dsa_top_k=1)
    assert 0 < min(shares) and max(shares) <= 1 and np.mean(shares) > 1 / 60


def test_table(small_model):
    path = small_model(n_vocab=512, n_ctx=512)
    result = CliRunner().invoke(needle.main, [str(path), "-l", "256,320", "-p", "0,100", "-n", "1", "-o", "json", "-t", "1",
                                              "--max-tokens", "4"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(row["attention"], row["tokens"]) for row in rows] == [(mode, n) for mode in needle.MODES for n in (256, 320)]
    assert all(row["recall"] == 0 and row["questions"] == 2 for row in rows)
    assert [row["mass"] is None for row in rows] == [False, False, True, True, False, False]


@pytest.mark.parametrize("args,message", [
    (["-a", "best"], "sparse, dense, random"), (["-p", "120"], "within 0 and 100"), (["-l", "20"], "at least 256"),
    (["-l", "many"], "not a list of whole numbers")])
def test_refusals(small_model, args, message):
    result = CliRunner().invoke(needle.main, [str(small_model()), *args])
    assert result.exit_code == 2 and message in result.output
