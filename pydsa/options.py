"""The values of options, checked: one of several, or a number in a range."""
import numpy as np

from pydsa.errors import PydsaError


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
