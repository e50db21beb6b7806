"""glm-dsa: GLM-5, which is deepseek32 with another RoPE in the indexer.

From GLM-5.2 on, layers share a choice of keys.
"""
from dataclasses import dataclass

from pydsa.errors import GGUFError
from pydsa.models import deepseek2, deepseek32

INDEXER_NEOX = False    # as in the attention: pairs (2i, 2i + 1)
LONG_CONTEXT = 1_048_576    # in files with this context layers share choices, even without the key


@dataclass(frozen=True)
class Config(deepseek32.Config):
    """The hyperparameters of deepseek32."""

    @classmethod
    def from_metadata(cls, metadata, n_vocab):
        """The Config of a file whose token_embd.weight has n_vocab rows.

        Raises GGUFError or UnsupportedModelError for keys that are not valid.
        """
        base = deepseek2.read_metadata(metadata, n_vocab, default_gating=deepseek2.SIGMOID)
        return cls(**base, **deepseek32.read_indexer(metadata, base), indexer_full=indexer_full(metadata, base))


def indexer_full(metadata, base):
    """For each layer, whether it has an indexer.

    The key indexer.types says so, or else the pattern of the published models holds.
    """
    key, n_layer = "glm-dsa.attention.indexer.types", base["n_layer"]
    if key not in metadata:
        long = base["n_ctx_train"] >= LONG_CONTEXT
        return tuple(not long or il < 2 or il % 4 == 2 for il in range(n_layer))
    types = metadata.integers(key)
    if len(types) not in (n_layer, n_layer + base["n_layer_nextn"]):
        raise GGUFError(f"{metadata.path}: {key} has {len(types)} values, expected {n_layer}, one for each layer.")
    if not set(types.tolist()) <= {0, 1}:
        raise GGUFError(f"{metadata.path}: {key} holds {max(types)}, expected 1 for a layer with an indexer or 0 for one that shares.")
    if not types[0]:
        raise GGUFError(f"{metadata.path}: {key} is 0 for layer 0, expected 1, as there is no earlier layer whose choice it could share.")
    return tuple(bool(t) for t in types[:n_layer])


def build(graph, config, weights, variant, layers):
    """Record the forward pass of layers in the form of a schedule.Variant."""
    deepseek32.build_with_indexer(graph, config, weights, variant, layers, INDEXER_NEOX)
