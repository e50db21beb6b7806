"""How many kernels a token's step launches on a GPU, layer by layer."""
import json

from test_cuda import run_python

SHAPES = dict(n_layer=3, n_embd=256, n_lora_q=256, n_lora_kv=512, n_nope=128, n_rot=64, n_v=128, n_ff=256, n_ff_exp=256, n_expert=4,
              indexer_head_size=128, n_vocab=300)
GLM = dict(arch="glm-dsa", n_nope=192, n_v=256, n_expert_groups=1)
LISTED = """
import sys, json
from tests.ptx.driver import install
install().capability = 9, 0
from tools.launches import launched, step_of
print(json.dumps([launched(step_of(path, attention="sparse", kv_type="i16", n_ctx=128, n_ubatch=4)) for path in sys.argv[1:]]))
"""


def test_launches_of_layers(small_model):
    """Layers of V3.2's and of GLM-5's form.

    The second one is dense, the third one has experts; both are in the middle of a step.
    """
    paths = [str(small_model(**SHAPES | {"n_layer_dense": 2} | form)) for form in ({"type": "Q4_K_M"}, GLM | {"type": "Q8_0"})]
    for layers in json.loads(run_python("-c", LISTED, *paths, device="ptx")):
        assert len(layers["1"]) == 13 and len(layers["2"]) == 12, layers
