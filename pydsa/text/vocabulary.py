"""The vocabulary as a grammar sees it, made once for a tokenizer.

    vocabulary = vocabulary_of(tokenizer, shown)

Control tokens are no text, but for those that a layout shows: a mark of a call is the same text whether it comes as one token or in pieces.
"""
import bisect
import functools
import re
import threading
import weakref

import numpy as np

from pydsa.errors import PydsaError
from pydsa.text.grammars import llguidance
from pydsa.text.tokenizer import CONTROL, UNKNOWN, UNUSED

PROBES = "qzQX"         # characters that only free content allows, all of them at once
_MADE = weakref.WeakKeyDictionary()         # tokenizer -> {shown: Vocabulary}
_LOCK = threading.Lock()


def vocabulary_of(tokenizer, shown=frozenset()):
    """The Vocabulary of a tokenizer, made where there is none yet.

    shown: ids of control tokens that are text.
    """
    with _LOCK:
        made = _MADE.setdefault(tokenizer, {})
        if shown not in made:
            texts = next(iter(made.values())).texts if made else [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
            made[shown] = Vocabulary(tokenizer, shown, texts)
        return made[shown]


class Vocabulary:
    """The bytes of all tokens, and the library's tree of them.

    texts: bytes of each token. shown: ids of control tokens that are text. probes: ids of single characters, for content that is free.
    letters: ids of single letters that no number has.
    """

    def __init__(self, tokenizer, shown, texts):
        self.texts, self.shown, self.n_vocab = texts, shown, tokenizer.n_vocab
        self._tokenizer, self.eog_ids = weakref.ref(tokenizer), sorted(tokenizer.eog_ids)     # weak, as it is the key of _MADE
        if not self.eog_ids:
            raise PydsaError(f"{tokenizer.path}: the vocabulary has no token that ends a turn, expected one for constrained output")
        special = np.isin(tokenizer.token_type, (UNKNOWN, CONTROL))
        special[list(shown)] = False
        special[self.eog_ids] = True
        self._beginning, self._holding = {}, {}
        self._read_tree(special, np.flatnonzero(tokenizer.token_type == UNUSED).tolist())
        single = {text: i for i, text in enumerate(texts) if len(text) == 1 and not special[i]}
        self.probes = [single[c.encode()] for c in PROBES if c.encode() in single]
        self.letters = [i for text, i in single.items() if text.isalpha() and text not in b"eE"]
        # In a number: the digits that a token begins with, and tokens that have an exponent beyond float64 in themselves.
        self.digits = np.array([len(re.match(rb"[0-9]*", text)[0]) for text in texts], np.uint8)
        self.exponents = np.array([i for i, text in enumerate(texts) if re.match(rb"[0-9.]*[eE][+-]?[0-9]{3}", text)], np.int64)

    def _read_tree(self, special, unused):
        """Build the library's tree; unused tokens are never text."""
        library = llguidance()
        tokens = [b"" if i in set(unused) else text for i, text in enumerate(self.texts)] if unused else self.texts

        class Given:
            """What the library asks of a tokenizer."""
            eos_token_id, bos_token_id = self.eog_ids[0], None
            special_token_ids = np.flatnonzero(special).tolist()

            def __call__(self, text):
                return encode(text)

        def encode(text):       # only asked for texts of grammars that want their canonical tokens
            try:
                return self._tokenizer().encode(text.decode(errors="replace") if isinstance(text, bytes) else text)
            except PydsaError:      # a character that the vocabulary lacks
                return []
        Given.tokens = tokens
        self.tree = library.LLTokenizer(library.TokenizerWrapper(Given()), n_vocab=self.n_vocab, eos_token=self.eog_ids)

    def beginning(self, text):
        """The ids of tokens that begin with some bytes, int64 [n].

        They are kept: only the ends of a few marks are asked for.
        """
        if text not in self._beginning:
            order, texts = self._sorted
            span = slice(bisect.bisect_left(texts, text), bisect.bisect_left(texts, text + b"\xff" * 64))
            self._beginning[text] = np.array(order[span], np.int64)
        return self._beginning[text]

    def holding(self, text):
        """The ids of tokens that hold some bytes after their first, int64 [n]."""
        if text not in self._holding:
            self._holding[text] = np.array([i for i, token in enumerate(self.texts) if text in token[1:]], np.int64)
        return self._holding[text]

    @functools.cached_property
    def _sorted(self):
        """The ids in the order of their bytes, and these."""
        order = sorted(range(self.n_vocab), key=self.texts.__getitem__)
        return order, [self.texts[i] for i in order]
