"""deepseek32: deepseek2 with DeepSeek Sparse Attention.

An indexer in every layer chooses the keys (DeepSeek-V3.2-Exp, section 2).
"""
import dataclasses
import math
from dataclasses import dataclass

from pydsa.errors import GGUFError, UnsupportedModelError
from pydsa.executor.graph import CacheRef
from pydsa.models import deepseek2
from pydsa.models.stored import linear

INDEXER_NEOX = True     # RoPE of the indexer rotates pairs (i, i + n_rot / 2)
K_NORM_EPS = 1e-6       # not in the file


@dataclass(frozen=True)
class Config(deepseek2.Config):
    """The hyperparameters of deepseek2 and of the indexer."""
    indexer_n_head: int
    indexer_head_size: int
    indexer_top_k: int
    indexer_full: tuple     # for each layer: whether it has an indexer, else it uses the choice of the last layer that has one

    VARIANTS = {"auto": ("mha+keys", "dense+keys", "mha+choice", "sparse"), "sparse": ("sparse",), "masked": ("masked",),
                "dense": ("mha", "dense")}

    @property
    def top_k(self):
        """The number of keys that a token attends to."""
        return self.indexer_top_k

    def with_top_k(self, top_k):
        """The Config with another top_k."""
        return dataclasses.replace(self, indexer_top_k=top_k)

    @property
    def indexed_layers(self):
        """For each layer, the layer whose indexer it uses."""
        return tuple(max(i for i in range(il + 1) if self.indexer_full[i]) for il in range(self.n_layer))

    @property
    def cache_widths(self):
        """{CacheRef: the numbers of values of a cache row's parts}."""
        keys = {CacheRef("index_keys", il): (self.indexer_head_size,) for il in range(self.n_layer) if self.indexer_full[il]}
        return super().cache_widths | keys

    @classmethod
    def from_metadata(cls, metadata, n_vocab):
        """The Config of a file whose token_embd.weight has n_vocab rows.

        Raises GGUFError or UnsupportedModelError for keys that are not valid.
        """
        base = deepseek2.read_metadata(metadata, n_vocab, default_gating=None)
        return cls(**base, **read_indexer(metadata, base), indexer_full=(True,) * base["n_layer"])


def read_indexer(metadata, base):
    """The indexer's fields of Config, from the keys under attention.indexer."""
    key = f"{base['architecture']}.attention.indexer."
    integer, _ = deepseek2.readers(metadata, base["architecture"], base["n_layer"])
    if base["q_lora"] == 0:
        raise GGUFError(f"{metadata.path}: {base['architecture']}.attention.q_lora_rank is missing or 0, expected at least 1, "
                        "as the indexer needs a latent query.")
    size = integer("attention.indexer.key_length", 1, 4096)
    if size & (size - 1) or size < base["n_rot"]:
        raise GGUFError(f"{metadata.path}: {key}key_length is {size}, expected a power of two of at least rope.dimension_count, "
                        f"{base['n_rot']}.")
    return dict(indexer_n_head=integer("attention.indexer.head_count", 1, 4096), indexer_head_size=size,
                indexer_top_k=integer("attention.indexer.top_k", 1, 2**31 - 1))


def build(graph, config, weights, variant, layers):
    """Record the forward pass of layers in the form of a schedule.Variant."""
    build_with_indexer(graph, config, weights, variant, layers, INDEXER_NEOX)


def build_with_indexer(g, c, weights, variant, layers, neox):
    """Record a whole model with its indexers, or the layers of a stage.

    A layer without an indexer uses the choice of the last layer that has one.
    """
    choice = None

    def select(il, h, qr, table, rows):
        nonlocal choice
        if variant.indexer is not None and c.indexer_full[il]:
            w = weights.layer(il)
            if not w.has("indexer.attn_k.weight"):
                raise UnsupportedModelError(f"{w.path}: layer {il} should have an indexer, but there is no tensor "
                                            f"'blk.{il}.indexer.attn_k.weight'; use --attention dense.")
            store_index_key(g, c, w, il, h, table, neox)
            if variant.chooses:
                choice = choose_keys(g, c, w, il, rows(h), qr, rows(table), neox, variant)
        return None if choice is None else rows(choice)

    deepseek2.decoder(g, c, weights, variant, layers, select)


def rotate(g, c, x, table, neox):
    """Record RoPE on the first n_rot values of each head, then Hadamard.

    The Hadamard rotation of the whole head spreads outliers over the row.
    """
    g.rope(x.slice(0, c.n_rot), table, neox)
    return g.hadamard(x)


def store_index_key(g, c, w, il, h, table, neox):
    """Record the token's index key, which the indexer's heads share."""
    size = c.indexer_head_size
    k = linear(g, w, f"indexer_k_raw-{il}", "indexer.attn_k", h, size, c.n_embd)
    k = g.layer_norm(f"indexer_k-{il}", k, w("indexer.k_norm.weight", size), w("indexer.k_norm.bias", size), K_NORM_EPS)
    rotate(g, c, k.reshape(1, size), table, neox)
    g.cache_write(CacheRef("index_keys", il), k)


def choose_keys(g, c, w, il, h, qr, table, neox, variant):
    """Record the choice of keys: their indices, or a mask made of them."""
    heads, size = c.indexer_n_head, c.indexer_head_size
    q = linear(g, w, f"indexer_q-{il}", "indexer.attn_q_b", qr, heads * size, c.q_lora).reshape(heads, size)
    rotate(g, c, q, table, neox)
    weights = linear(g, w, f"indexer_weights-{il}", "indexer.proj", h, heads, c.n_embd)
    keys, scale, k = CacheRef("index_keys", il), 1 / math.sqrt(heads * size), min(c.indexer_top_k, g.n_ctx)
    if variant.indexer != "mask":
        return g.indexer_select(f"indexer_top_k-{il}", q, weights, keys, k, scale)
    scores = g.indexer_scores(f"indexer_score-{il}", q, weights, keys, scale)
    return g.scatter_mask(f"kq_mask-{il}", g.top_k(f"indexer_top_k-{il}", scores, k))
