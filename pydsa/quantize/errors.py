"""Sums of squared errors of quantized rows."""
import numpy as np
from numba import types

from pydsa.backends.cpu.jit import kernel


@kernel
def add_errors(x, y, importance, sums):
    """Add to sums, float64 [4], those of rows x and of what they became, y.

    They are the squares of the errors and of x, and both times the importance, float32 [k] or [0].
    """
    for i in range(x.shape[0]):
        plain = norm = weighted = weighted_norm = 0.0
        for j in range(x.shape[1]):
            value = np.float64(x[i, j])     # its square may be too large for float32
            rest = np.float64(y[i, j]) - value
            plain += rest * rest
            norm += value * value
        sums[0] += plain
        sums[1] += norm
        if importance.size:
            for j in range(x.shape[1]):
                value = np.float64(x[i, j])
                rest = np.float64(y[i, j]) - value
                weighted += importance[j] * rest * rest
                weighted_norm += importance[j] * value * value
            sums[2] += weighted
            sums[3] += weighted_norm


def signature():
    """The types of the kernel's arguments."""
    return types.float32[:, ::1], types.float32[:, ::1], types.float32[::1], types.float64[::1]
