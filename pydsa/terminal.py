"""Text for terminals: what a file or a model says must not control them.

A terminal obeys control characters: a name with some in it could clear the screen, change the title or hide what follows.
"""
import json
import math
import re

# Control characters but for newline and tab, halves of surrogate pairs, line separators, and what turns the direction of text
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _shown(match):
    code = ord(match[0])
    return f"^{chr(code ^ 64)}" if code < 128 else f"<U+{code:04X}>"


def harmless(text):
    """Text of any length for a terminal: what it would obey is shown.

    As `less` shows it: ESC is ^[, others are <U+202E>. Newlines and tabs stay.
    """
    return _OBEYED.sub(_shown, text)


def visible(text, keep=""):
    """A name or a message on one line; what cannot be seen is shown.

    Beside what harmless() shows this is all that is invisible, such as spaces without width. The characters `keep` stay, and other newlines
    become spaces.
    """
    if "\n" not in keep:
        text = text.replace("\n", " ")
    return text if text.isprintable() else "".join(
        c if c.isprintable() or c in keep else _shown([c]) for c in text)


def json_text(value, indent=None):
    """JSON with all letters as they are, and what visible() shows as \\uXXXX.

    Numbers that are not finite are null: JSON has none.
    """
    def escaped(match):
        return "".join(f"\\u{int.from_bytes(pair, 'big'):04x}" for pair in _halves(match[0]))
    text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else escaped([c]) for c in text)


def _finite(value):
    """A value of JSON with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _halves(character):
    data = character.encode("utf-16-be", "surrogatepass")
    return [data[i:i + 2] for i in range(0, len(data), 2)]
