"""Attention of prompts to all keys in MLA's plain form, in wgmma."""
from pydsa.backends.cuda.flash import attend  # noqa: F401
