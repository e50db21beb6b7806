"""Choices of keys compared: with what scores say, and with each other.

A choice is int32 [n, k], a row for each token: ascending positions of keys, and -1 at the end of a row.
"""
import numpy as np

from pydsa.faithful.definition import best

# Scores are sums of products whose factors are rounded, to 15 bits at worst. A key within this distance of the last chosen one's score, in
# standard deviations of the token's scores, may or may not be chosen.
NEAR = 1e-3
TOGETHER = 16       # neighbouring tokens whose keys are united


def masks(choice, n_keys):
    """A choice [n, k] as masks [n, n_keys].

    Numbers that are no key's position are left out.
    """
    found = np.zeros((len(choice), n_keys + 1), bool)
    np.put_along_axis(found, np.where((choice >= 0) & (choice < n_keys), choice, n_keys), True, axis=1)
    return found[:, :n_keys]


def malformed(choice, positions, top_k):
    """Whether each row [n, k] is not a choice at its position: a mask [n].

    Such a row has another number of keys than it should, later ones, or some out of order.
    """
    n = np.minimum(top_k, positions + 1)
    if choice.shape[1] < n.max():
        return np.ones(len(choice), bool)
    filled = np.arange(choice.shape[1]) < n[:, None]
    right = np.where(filled, (choice >= 0) & (choice <= positions[:, None]), choice == -1).all(axis=1)
    return ~right | ((np.diff(choice, axis=1) <= 0) & filled[:, 1:]).any(axis=1)


class Tally:
    """How a choice of one layer compares with the scores of the definition.

    Of all tokens that have more than top_k keys: tokens, keys (those that should be chosen), differing (those that are not), far (of these,
    those that rounding does not explain), malformed (rows), and the first position that has a far key.
    """

    def __init__(self):
        self.tokens = self.keys = self.differing = self.far = self.malformed = 0
        self.worst, self.first, self.like = 0.0, None, {}

    def add(self, choice, positions, scores, right, top_k):
        """Count the choice [n, k] of tokens -> whether any key is far.

        scores: [n, S]. right: the masks [n, S] of what should be chosen.
        """
        any_far = self.add_form(choice, positions, top_k) > 0
        found = masks(choice, scores.shape[1])
        for i, position in enumerate(positions):
            self.tokens += 1
            self.keys += int(right[i].sum())
            missing, extra = right[i] & ~found[i], found[i] & ~right[i]
            if not (missing.any() or extra.any()):
                continue
            past = scores[i, :position + 1]
            least, unit = scores[i][right[i]].min(), past.std() or 1.0
            with np.errstate(invalid="ignore"):     # a later key's score is -inf
                far = np.abs(scores[i] - least) > NEAR * unit
            n_far = max(int((missing & far).sum()), int((extra & far).sum()))
            self.differing += max(int(missing.sum()), int(extra.sum()))
            self.worst = max(self.worst, float(np.abs(scores[i][missing | extra] - least).max() / unit))
            self.far += n_far
            any_far = any_far or n_far > 0
            if n_far and (self.first is None or position < self.first):
                self.first = int(position)
        return any_far

    def add_form(self, choice, positions, top_k):
        """Count the malformed rows of a choice [n, k] -> their number."""
        n = int(malformed(choice, positions, top_k).sum()) if len(choice) else 0
        self.malformed += n
        return n

    @property
    def recall(self):
        """The share of the keys that should be chosen and are."""
        return 1 - self.differing / self.keys if self.keys else 1.0

    def liken(self, sentence, choice, right):
        """Count how much a choice [n, k] is like the masks [n, S] of a fault."""
        hits, keys = self.like.get(sentence, (0, 0))
        self.like[sentence] = hits + int((masks(choice, right.shape[1]) & right).sum()), keys + int(right.sum())

    def likeness(self):
        """The fault that the choice is most like: (sentence, recall), or None.

        It must explain most of what the definition does not.
        """
        shares = {sentence: hits / keys for sentence, (hits, keys) in self.like.items() if keys}
        if not shares:
            return None
        sentence = max(shares, key=shares.get)
        return (sentence, shares[sentence]) if 1 - shares[sentence] < (1 - self.recall) / 2 else None


def simple_faults(scores, right, positions):
    """Sentences on choices that no scores explain, each with masks [n, S].

    scores: [n, S]. right: the masks of what should be chosen.
    """
    def shifted(by):
        moved = np.zeros_like(right)
        moved[:, max(by, 0):right.shape[1] + min(by, 0)] = right[:, max(-by, 0):right.shape[1] - max(by, 0)]
        return moved

    counts = right.sum(axis=1)
    keys = np.arange(scores.shape[1])
    seen = keys <= positions[:, None]
    lowest = np.array([best(np.where(mask, -row, -np.inf), n) for row, mask, n in zip(scores, seen, counts)])
    return {"the keys with the lowest scores are chosen": lowest,
            "the newest keys are chosen": seen & (keys > (positions - counts)[:, None]),
            "the first keys are chosen": keys < counts[:, None],
            "positions are one too great": shifted(1), "positions are one too small": shifted(-1)}


def ties(scores, right):
    """How many keys score as the last chosen one, and the like.

    Returns (keys with its score, whether the rule for ties decided, more keys near it). scores: those of one token's keys, [S]. right:
    what should be chosen, a mask [S] with fewer keys than there are. Of equal scores the first keys are chosen.
    """
    least = scores[right].min()
    equal = scores == least
    near = np.abs(scores - least) <= NEAR * (scores.std() or 1.0)
    return int(equal.sum()), bool((equal & ~right).any()), int((near & ~equal).sum())
