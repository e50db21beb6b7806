"""Times of steps in layers: reads over bandwidth, products over a rate.

All figures come from a Setup of the whole model; nothing is read of its weights.
"""
import numpy as np

from pydsa.executor.costs import StepSize, node_cost
from pydsa.executor.graph import CacheRef
from pydsa.executor.placement import home_layer
from pydsa.executor.schedule import ending_early
from pydsa.gguf.file import Tensor

CHUNK = 512         # tokens of a prompt that run together at most, so that several parts of it are under way
PROMPT = 4096       # tokens of the prompt whose time is told
OF_EXPERTS = ("moe_gate_up", "moe_linear", "moe_down")      # ops with experts' matrices, and with ids as their third argument


class Ops:
    """The ops of a step: bytes that they read, and their products.

    n_tokens: tokens of the step after n_past others; several are of a prompt that goes on, so none of them has logits. choosing: the
    number of tokens that choose experts, whose weights are read once for all of them. Bytes of weights and of caches, operations, and the
    layer of each op are float64 [n]; the head is with the first layer.
    """

    def __init__(self, setup, n_tokens, n_past, choosing):
        rows, found = setup.cache_row_bytes, []
        variant, prompt = setup.schedule.variant(n_past, n_tokens), n_tokens > 1
        for node in setup.graphs[ending_early(variant) if prompt else variant].nodes:
            if not any(isinstance(a, (Tensor, CacheRef)) for a in node.args) or prompt and node.for_outputs:
                continue
            experts = {node.args[2]: _chosen(setup.config, choosing)} if node.op in OF_EXPERTS else {}
            cost = node_cost(node, StepSize(n_tokens, n_past, rows, experts))
            found.append((cost.weights, cost.cache, cost.operations, max(0, home_layer(node))))
        self.weights, self.caches, self.operations, self.layers = np.array(found, np.float64).T

    def seconds(self, node, several=True, streams=1):
        """The time of each op on a division.Node, float64 [n].

        An op takes the time to read its bytes, or to do its products, whichever is longer; it is only to read where not several tokens run.
        streams: conversations of so many caches.
        """
        reads = (self.weights + streams * self.caches) / node.bandwidth
        return np.maximum(reads, streams * self.operations / node.rate) if several else reads


def _chosen(config, n_tokens):
    """The number of experts that n_tokens tokens choose, on average."""
    return config.n_expert * (1 - (1 - config.n_expert_used / config.n_expert) ** n_tokens)


def of_a_chunk(setup):
    """The Ops of a chunk in the middle of a prompt of PROMPT tokens."""
    n_tokens = min(CHUNK, setup.n_ubatch, setup.n_ctx)
    return Ops(setup, n_tokens, max(0, min(PROMPT // 2, setup.n_ctx - n_tokens)), n_tokens)
