"""Which keys a token attends to: all, all with a mask, or those that were chosen; a number that kernels take."""

DENSE, MASKED, SPARSE = range(3)
