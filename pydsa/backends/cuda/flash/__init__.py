"""Attention of prompts to all keys in MLA's plain form."""
from pydsa.backends.cuda.flash import attention  # noqa: F401
