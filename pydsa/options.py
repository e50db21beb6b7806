"""The values of options, checked: one of several, or a number in a range; sizes as text."""
import re

import numpy as np

from pydsa.errors import PydsaError

FLOAT16, EXACT = PRECISIONS = "float16", "exact"        # of prompts' products on devices that have both; the first is the default


def choose(what, value, choices):
    """The value of an option, if it is one of the choices."""
    if value not in choices:
        raise PydsaError(f"{what} is {value!r}, expected one of {', '.join(choices)}.")
    return value


def counts(most, **options):
    """The values of options that are None or an integer from 1 to `most`.

    They are integers of Python or numpy, and returned as int, in a list. Raises PydsaError for others.
    """
    for what, value in options.items():
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (integer and 1 <= value <= most):
            raise PydsaError(f"{what} is {value!r}, expected an integer from 1 to {most}.")
    return [value if value is None else int(value) for value in options.values()]


def size(n):
    """A number of bytes as readable text."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} B"


def size_in_bytes(what, value):
    """Bytes of an integer, or of a text such as "24GiB", "512 MiB", "1.5G".

    K, M, G and T are powers of 1024, with or without "iB"; with "B" alone they are powers of 1000. Raises PydsaError for what is no size,
    and for a text without a unit that would be less than 1 MiB.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return int(value)
    form = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(ib|b)?)\s*", value.lower()) if isinstance(value, str) else None
    if form is None or len(form[1]) > 20:
        raise PydsaError(f"{what} is {value!r}, expected a size such as 24GiB or 512MiB.")
    n_bytes = int(float(form[1]) * (1000 if form[3] == "b" else 1024) ** " kmgt".index(form[2] or " "))
    if not form[2] and not form[3] and 0 < n_bytes < 1 << 20:
        raise PydsaError(f"{what} is {value!r}, which is {n_bytes} bytes: give a unit, as in 24GiB.")
    return n_bytes


def bytes_per_second(what, value):
    """Bytes a second of a text such as "10 Gbit/s" or "1.25 GB/s".

    K, M, G and T are powers of 1000. Raises PydsaError for what is no such rate, and for "Gb/s", which means either.
    """
    form = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT])(bit/s|B/s)\s*", value) if isinstance(value, str) else None
    if form is None or len(form[1]) > 20 or float(form[1]) == 0:
        raise PydsaError(f"{what} is {value!r}, expected bits or bytes a second such as 10Gbit/s or 1.25GB/s.")
    return float(form[1]) * 1000 ** " KMGT".index(form[2].upper()) / (8 if form[3] == "bit/s" else 1)
