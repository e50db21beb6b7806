"""What all pictures share: matplotlib's Figure, where it is installed."""
from pydsa.errors import PydsaError


def figure_class():
    """matplotlib's Figure, without pyplot: no windows, no global state.

    Raises PydsaError where it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PydsaError("To draw, pydsa needs matplotlib: pip install 'pydsa[plot]', then run this again.") from None
    return Figure
