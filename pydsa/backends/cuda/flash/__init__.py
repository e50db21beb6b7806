"""Attention of prompts to all keys in MLA's plain form, in wgmma or mma.sync."""
from pydsa.backends.cuda.flash import attention  # noqa: F401
