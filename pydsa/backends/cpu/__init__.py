"""The CPU backend: the ops of reference.py as Numba kernels, on float32 values and GGUF blocks as the file stores them."""
import numpy as np

from pydsa.backends.cpu.attention import dense_attention, masked_attention, sparse_attention  # noqa: F401
from pydsa.backends.cpu.ceilings import measure_ceilings, product_format  # noqa: F401
from pydsa.backends.cpu.indexer import indexer_scores, indexer_select, scatter_mask  # noqa: F401
from pydsa.backends.cpu.linear import head_linear, linear  # noqa: F401
from pydsa.backends.cpu.mha import mha_attention, mha_sparse_attention  # noqa: F401
from pydsa.backends.cpu.moe import moe_down, moe_gate_up, moe_linear  # noqa: F401
from pydsa.backends.cpu.norm import add, expert_scale, layer_norm, rms_norm, scale, silu_mul  # noqa: F401
from pydsa.backends.cpu.rope import hadamard, rope, rope_table  # noqa: F401
from pydsa.backends.cpu.route import moe_route  # noqa: F401
from pydsa.backends.cpu.rows import cache_bytes, cache_rows, cache_write, form_costs, get_rows, reproducible, weight  # noqa: F401
from pydsa.backends.cpu.scratch import nan_met  # noqa: F401
from pydsa.backends.cpu.team.steps import compile_calls, recorded, timed  # noqa: F401
from pydsa.backends.cpu.team.threads import check_threads, set_threads  # noqa: F401
from pydsa.backends.cpu.top_k import top_k  # noqa: F401
from pydsa.backends.cpu.variants import VARIANTS  # noqa: F401
from pydsa.backends.host import empty, fetch, free_bytes, measure_bus, store, upload  # noqa: F401


FLOAT = np.float32
PICKS = 0       # logits are the host's, which picks from them
WEIGHTS_FIRST = False       # they hold addresses of compiled functions
