"""How well a model predicts a text, under several settings."""
from pydsa.quality.measurement import DEFAULT_N_CTX, Measurement, perplexity  # noqa: F401
