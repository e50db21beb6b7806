"""Attention modes: which keys a token attends to, as an integer for kernels.

DENSE: all keys. MASKED: all keys, with an additive mask. SPARSE: the chosen (top-k) keys.
"""

DENSE, MASKED, SPARSE = range(3)
