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
from pydsa.backends.cuda import variants
from tools.check_gpu import JOINS
found = []
for path, *left_out in [*([path] for path in sys.argv[1:]), *((sys.argv[2], name) for name in [*JOINS.split(", "), JOINS])]:
    off = variants.without(*left_out or [""])
    variants.switched_off = lambda: off
    found.append(launched(step_of(path, attention="sparse", kv_type="i16", n_ctx=128, n_ubatch=4)))
print(json.dumps(found))
"""


def test_launches_of_layers(small_model):
    """Layers of V3.2's and of GLM-5's form.

    The second one is dense, the third one has experts; both are in the middle of a step. What one launch does beside or for another can be
    left out by names, one by one and all.
    """
    paths = [str(small_model(**SHAPES | {"n_layer_dense": 2} | form)) for form in ({"type": "Q4_K_M"}, GLM | {"type": "Q8_0"})]
    first, second, *others = json.loads(run_python("-c", LISTED, *paths, device="ptx"))
    for layers in (first, second):
        assert len(layers["1"]) == 13 and len(layers["2"]) == 12, layers
    numbers = [(len(layers["1"]), len(layers["2"])) for layers in others]
    assert numbers == [(14, 13), (14, 13), (13, 13), (13, 13), (14, 13), (16, 17)], numbers
