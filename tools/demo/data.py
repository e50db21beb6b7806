"""Batches of the demo model: its tokenizer, ids, weights, positions.

The texts come from notes.py.
"""
import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pydsa.text.tokenizer import PRE_TOKENIZERS
from tools.demo import notes
from tools.make_model import FIRST_TOKENS, LAST_TOKENS


def pre_tokenizer():
    """The pre-tokenizer of DeepSeek-V3, "deepseek-v3" in GGUF files."""
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS["deepseek-v3"][0]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(path, prose, n_vocab, digits):
    """Train the tokenizer on the prose and the words of notes.py.

    Numbers of up to `digits` digits become one token.
    """
    words = [*notes.ADJECTIVES, *notes.NOUNS]
    texts = [*prose, *(" ".join(pair) for pair in notes.TALK)] * 2
    texts += [line.format(f"{a} {n}") for a in notes.ADJECTIVES for n in notes.NOUNS[::9] for line in notes.QUESTIONS[:7]]
    texts += [f"The code of the {a} {n} is  ." for a in notes.ADJECTIVES[::9] for n in notes.NOUNS for _ in range(3)]
    texts += [f" {word}" for word in words] * 200
    texts += [line.format("", "") for line in notes.SUMS] * 50
    texts = ["".join(" " if c.isdigit() else c for c in text) for text in texts]
    texts += [f"{i:0{n}d}" for n in range(1, digits + 1) for i in range(10 ** n)] * (500 if digits > 1 else 1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer()
    n_learned = n_vocab - len(FIRST_TOKENS) - len(LAST_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=n_learned, min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    Path(path).write_text(json.dumps({"tokens": tokens, "merges": merges}))


class Vocabulary:
    """The learned tokens between the markers, in make_model.py's order."""

    def __init__(self, path):
        self.learned, self.merges = json.loads(Path(path).read_text()).values()
        self.tokens = [*FIRST_TOKENS, *self.learned, *LAST_TOKENS]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        ids = {token: self.ids[token] for token in self.learned}
        self.bpe = Tokenizer(models.BPE(ids, [tuple(merge.split(" ")) for merge in self.merges]))
        self.bpe.pre_tokenizer = pre_tokenizer()
        self.known = {}

    def encode(self, text):
        """The ids of a text without markers."""
        if text not in self.known:
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[text] = self.bpe.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def count(self, parts):
        """The number of tokens of parts."""
        return sum(1 if isinstance(part, str) else len(self.encode(part[0])) for part in parts)

    def lay_out(self, parts):
        """The ids of parts, and the weight of each id as a target."""
        ids, weights = [], []
        for part in parts:
            if isinstance(part, str):
                ids.append(self.ids[part])
                weights.append(1.0 if part == notes.EOS else 0.0)
            else:
                new = self.encode(part[0])
                ids += new
                weights += [part[1]] * len(new)
        return ids, weights


def stretched(rng, breaks, n, reach):
    """Positions 0 <= ... < reach of n tokens, with up to eight gaps.

    Gaps come before tokens of `breaks`. They give a short text the distances of a long one, cheaply.
    """
    gaps = np.zeros(n, np.int64)
    room = reach - n
    if room > 0 and len(breaks) and rng.random() < 0.6:
        k = rng.integers(1, 9)
        shares = rng.dirichlet(np.ones(k + 1))[:k]
        np.add.at(gaps, rng.choice(breaks, k), (shares * room * rng.random()).astype(np.int64))
    return np.arange(n) + np.cumsum(gaps)


def batch(seed, step, vocabulary, prose, length, n_rows, mix, reach):
    """A step's ids [n_rows, length + 1], weights and positions.

    Weights and positions are [n_rows, length]. The same arguments give the same batch.
    """
    rng = np.random.default_rng([seed, length, step])
    user, newline, rows = vocabulary.ids[notes.USER], vocabulary.encode("\n")[0], []
    for _ in range(n_rows):
        kind = notes.KINDS[rng.choice(len(notes.KINDS), p=mix)]
        parts = kind(rng, length + 1, vocabulary.count, prose)
        ids, weights = vocabulary.lay_out(parts)
        breaks = [i for i in range(1, length) if ids[i] == user or ids[i - 1] == newline]
        rows.append((ids[:length + 1], weights[1:length + 1], stretched(rng, breaks, length, reach)))
    return tuple(np.array(column) for column in zip(*rows))
