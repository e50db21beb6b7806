"""glm-dsa: GLM-5, which is deepseek32 with another RoPE in the indexer and, from 5.2 on, layers that share a choice of keys."""
from dataclasses import dataclass

from pydsa.errors import GGUFError
from pydsa.models import deepseek2, deepseek32

INDEXER_NEOX = False    # as the attention: pairs (2i, 2i + 1)
LONG_CONTEXT = 1_048_576    # files with this context share choices even if they do not say so


@dataclass(frozen=True)
class Config(deepseek32.Config):
    """deepseek32's."""

    @classmethod
    def from_metadata(cls, metadata, n_vocab):
        """Read and check the keys of a file whose token_embd.weight has n_vocab rows."""
        base = deepseek2.read_metadata(metadata, n_vocab, default_gating=deepseek2.SIGMOID)
        return cls(**base, **deepseek32.read_indexer(metadata, base), indexer_full=indexer_full(metadata, base))


def indexer_full(metadata, base):
    """Which layers have an indexer of their own: indexer.types, or the pattern of the published models."""
    key, n_layer = "glm-dsa.attention.indexer.types", base["n_layer"]
    if key not in metadata:
        long = base["n_ctx_train"] >= LONG_CONTEXT
        return tuple(not long or il < 2 or il % 4 == 2 for il in range(n_layer))
    types = metadata.integers(key)
    if len(types) not in (n_layer, n_layer + base["n_layer_nextn"]):
        raise GGUFError(f"{metadata.path}: {key} has {len(types)} values for {n_layer} layers.")
    if not set(types.tolist()) <= {0, 1}:
        raise GGUFError(f"{metadata.path}: {key} holds {max(types)}; it must be 1 for a layer with an indexer and 0 for one that shares.")
    if not types[0]:
        raise GGUFError(f"{metadata.path}: {key} says that layer 0 shares the choice of an earlier layer; there is none.")
    return tuple(bool(t) for t in types[:n_layer])


def build(graph, config, weights, variant):
    """Record the forward pass as a schedule.Variant says."""
    deepseek32.build_with_indexer(graph, config, weights, variant, INDEXER_NEOX)
