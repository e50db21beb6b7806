"""Tokens as text that a page or a picture can show, a piece for each.

A character whose bytes are spread over several tokens is shown where its first byte is; the others have PART. What would turn the direction
of text, or cannot be seen, is written out.
"""
import numpy as np

from pydsa.terminal import harmless
from pydsa.text.tokenizer import CONTROL, UNKNOWN

PART = "\u00b7"             # a token with no first byte of a character
UNKNOWN_TEXT = "\u25af"     # a token that nobody recorded


def token_texts(tokenizer, ids):
    """The texts of tokens -> (a list of str, bool [n]: control tokens).

    ids: token ids, int [n], of which -1 is not known. Bytes that are not UTF-8 become U+FFFD.
    """
    data = [tokenizer.token_bytes(int(token)) if token >= 0 else b"" for token in ids]
    control = np.array([token >= 0 and tokenizer.token_type[token] in (UNKNOWN, CONTROL) for token in ids], bool)
    texts, start = [], 0
    for end in [*np.flatnonzero(control | (np.asarray(ids) < 0)).tolist(), len(data)]:      # a character never spans such a token
        texts += _whole_characters(data[start:end])
        if end < len(data):
            texts.append(data[end].decode(errors="replace") if data[end] else UNKNOWN_TEXT)
        start = end + 1
    return [harmless(text) for text in texts], control


def _whole_characters(data):
    """The characters that begin in each of some byte strings, a list of str."""
    characters = b"".join(data).decode(errors="surrogateescape")        # a lone surrogate stands for one byte that is not UTF-8
    wrong = ["\ud800" <= character <= "\udfff" for character in characters]
    sizes = [1 if bad else len(character.encode()) for character, bad in zip(characters, wrong)]
    tokens = np.searchsorted(np.cumsum([len(part) for part in data]), np.cumsum([0, *sizes[:-1]]), "right")
    texts = [[] for _ in data]
    for token, character, bad in zip(tokens.tolist(), characters, wrong):
        texts[token].append("\ufffd" if bad else character)
    return ["".join(text) or PART for text in texts]
