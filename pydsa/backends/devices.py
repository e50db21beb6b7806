"""The table of devices: each one's backend and its use of memory.

All figures come from shapes, so that no backend is imported for them.
"""
import importlib
import math
import os
from collections.abc import Callable
from typing import NamedTuple

from pydsa.errors import PydsaError
from pydsa.machine.numa import WORDS
from pydsa.options import PRECISIONS, choose

SCORED_BY_THREADS = 128     # tokens whose rows of index scores are in memory at a time (cpu/indexer.py)
SCORE_BYTES = 256 << 20     # of such rows in a GPU's memory, or SCORED_AT_LEAST tokens (cuda/indexer.py)
SCORED_AT_LEAST = 32
FEW_TOKENS = 8              # whose rows a GPU multiplies one by one (cuda/int8x2/gemv.py)
BLOCKS = 264                # into which a GPU's work is divided, two for each of its processors (cuda/runtime/launch.py)
FLASH_WIDTHS = (128, 64, 128, 512), (192, 64, 256, 512), (64, 32, 64, 256)     # n_nope, n_rot, n_v, kv_lora that cuda/flash has kernels for
FLASH_BYTES = 256 << 20     # of keys and values of heads that it has at a time, at most
FLASH_TILE = 128            # it has whole tiles of so many
UNLIMITED = 2**31 - 1
AUTO = "auto"               # in place of devices: those that a plan chooses (fitting.py)
HOST = "cpu"                # the device that reads weights where the file is mapped: experts that fit nowhere else are there


class FormCosts(NamedTuple):
    """What MLA's forms take where prompts attend to chosen keys.

    The unit is a product of the absorbed form. plain: a product of the plain form, with what goes with it. gather: to gather and pack a
    value of a chosen key for a token and all its heads, in the absorbed form.
    """
    plain: float
    gather: float


FORMS_BY_TILES = FormCosts(1, 55)       # where matrix units do products
LONGEST_PLAIN = FormCosts(0.7, 55)      # no backend's take the plain form in longer contexts


class Device(NamedTuple):
    """A backend and its use of memory, in bytes.

    weights(tensors) -> (bytes read from the mapped file, bytes copied). scratch(nodes, n_tokens) -> bytes of the kernels' scratch memory,
    beside the values of a graph. scored_together(n_kv) -> tokens whose rows of n_kv index scores are in memory at a time.
    packed_latents(config, n_kv) -> bytes of n_kv packed latents, for prompts in MLA's plain form. half_rows(nodes, n_ctx) -> bytes of a
    cache's rows as float16, for prompts that attend to chosen ones.
    """
    module: str                     # the name of the backend's module
    float_size: int                 # bytes of an intermediate value
    weights: Callable
    max_ubatch: int = UNLIMITED
    scored_together: Callable = lambda n_kv: UNLIMITED
    scratch: Callable = lambda nodes, n_tokens: 0
    packed_latents: Callable = lambda config, n_kv: 0
    half_rows: Callable = lambda nodes, n_ctx: 0
    side_by_side: bool = False      # whether ops that do not depend on each other run at the same time
    copies_blocks: bool = False     # whether loading copies every weight, which can take long
    described: bool = False         # whether the backend can describe its device
    maps: bool = False              # whether the ops read weights where the file is mapped
    places: bool = False            # whether its threads and their memory can be placed on nodes of the machine (numa.py)
    numbered: bool = False          # whether a machine can have several, whose numbers follow the name
    reserved: int = 0               # bytes of memory of its own that its driver takes, and kernels' code; 0: it has the host's memory
    reproducible: bool = False      # whether its ops have a form in which a token's results are the same in steps of any shape
    streams: bool = False           # whether steps of many tokens can take weights that are copied there for them (its backend's Slot)
    apart: int = 0                  # how many ops later a value's memory is used again in steps of one token, whose ops are fused
    bus: bool = False               # whether these copies go over a bus, whose rate says from how many tokens on they pay
    precisions: bool = False        # whether prompts' products are in the precision that a model is loaded with (options.PRECISIONS)

    def backend(self):
        """The backend's module, imported on the first call.

        Raises PydsaError where the environment lets Numba compile nothing.
        """
        if self.module != DEVICES["reference"].module:
            check_numba()
        return importlib.import_module(self.module)

    def describe(self):
        """A description of the device, or why it cannot be used.

        None if the backend has no description.
        """
        if not self.described:
            return None
        try:
            return self.backend().describe_device()
        except PydsaError as error:
            return str(error)


def _n_bytes(tensors):
    return sum(tensor.data.nbytes for tensor in tensors)


def _mapped(tensors):
    """Bytes of the tensors that are in the file as the ops take them."""
    return _n_bytes(tensor for tensor in tensors if tensor.make is None)


def _as_floats(tensors):
    return 4 * sum(math.prod(tensor.shape) for tensor in tensors)


def _cpu_weights(tensors):
    """Bytes of matrices, which stay in the file, and of the rest.

    That is vectors as float32, and what is made of other tensors.
    """
    return _mapped(tensors), _as_floats(tensor for tensor in tensors if len(tensor.shape) == 1) + _n_bytes(tensors) - _mapped(tensors)


def _cpu_packed_latents(config, n_kv):
    """Bytes of latents as the int8x2 kernels pack them, 256 at a time.

    Those of other formats take less (backends/cpu/*/mha.py).
    """
    per_key = 4 * (258 * -(-config.kv_lora // 256) + 64 * -(-config.n_rot // 64) + 1)
    return -(-n_kv // 256) * 256 * per_key


def flash_keys(n_head, n_nope, n_v, n_kv):
    """How many keys and values of all heads cuda/flash has at a time.

    A multiple of FLASH_TILE, for at most n_kv keys.
    """
    most = FLASH_BYTES // (2 * n_head * (n_nope + n_v)) // FLASH_TILE
    return FLASH_TILE * max(1, min(most, -(-n_kv // FLASH_TILE)))


def _cuda_packed_latents(config, n_kv):
    """Bytes of keys, values, latents and weights as float16 (cuda/flash).

    Weights of some types are float32 first. Models in another precision take less.
    """
    c = config
    if n_kv == 0 or (c.n_nope, c.n_rot, c.n_v, c.kv_lora) not in FLASH_WIDTHS:
        return 0
    of_key = c.n_head * (c.n_nope + c.n_v)
    return (2 * flash_keys(c.n_head, c.n_nope, c.n_v, n_kv) * (of_key + c.kv_lora + 64)
            + c.kv_lora * (2 * of_key + 4 * c.n_head * max(c.n_nope, c.n_v)))


def _cuda_scratch(nodes, n_tokens):
    """Bytes of packed activations, of experts' parts and of queries."""
    packed = hidden = parts = queries = absorbed = heads = splits = chosen = weights = 0
    rows = set()        # of one token's activations: (number, width)
    for node in nodes:
        if node.op in ("linear", "head_linear"):
            packed = max(packed, n_tokens * math.prod(node.args[2].tail))
            rows.add((math.prod(node.args[2].tail[:-1]), node.args[2].tail[-1]))
        elif node.op in ("moe_gate_up", "moe_linear"):
            hidden = max(hidden, n_tokens * math.prod(node.args[0].tail))
            rows.add(node.args[0].tail)
        elif node.op == "moe_down":
            parts = max(parts, n_tokens * node.args[2].tail[0] * node.args[0].tail[0])
        elif node.op in ("mha_attention", "mha_sparse_attention"):
            n_head, kv_lora, n_nope = node.args[-4].shape
            width = kv_lora + node.args[1].tail[1] - n_nope
            absorbed, heads = max(absorbed, n_tokens * n_head * (kv_lora + width)), max(heads, _packed_heads(n_tokens, n_head, width))
            packed, splits = max(packed, n_tokens * n_head * max(kv_lora, n_nope)), max(splits, _splits(n_head, kv_lora))
        elif node.op in ("dense_attention", "masked_attention", "sparse_attention"):
            heads, splits = max(heads, _packed_heads(n_tokens, *node.args[1].tail)), max(splits, _splits(*node.args[0].tail))
            if node.op == "sparse_attention":
                splits = max(splits, _parts_of_one_token(*node.args[0].tail, *node.args[3].tail))
        elif node.op in ("indexer_scores", "indexer_select"):
            queries = max(queries, n_tokens * -(-node.args[1].tail[0] // 32) * 32 * (2 * 128 + 4))     # two bytes for each of 128 values
        if _of_half_rows(node):
            n_head = node.args[1].tail[0]
            heads = max(heads, n_tokens * (-(-n_head // 64) * 64 * 2 * 576 + 8 * n_head))       # images of queries, of 64 heads
            chosen = max(chosen, n_tokens * (4 * n_head + 16) + 4 * BLOCKS + 512)
            if node.op == "mha_sparse_attention":       # k_b as float16, and as float32 if its type wants that first
                weights = max(weights, 6 * math.prod(node.args[-4].shape))
    packed = max(packed, hidden)
    # One token's activations take two bytes a value, in tiles of 1,024, with scales and sums. The values are at a few places of the layout.
    of_a_token = [4 * n * (-(-width // 1024) * 2048 + width * 3 // 8) for n, width in rows]
    one_token = sum(of_a_token) + min(n_tokens, FEW_TOKENS) * max(of_a_token, default=0)       # a few tokens' have one place
    # Packed activations are two float16 a value, with one sum for sixteen values.
    return 4 * packed + packed // 4 + 4 * (hidden + parts + absorbed) + queries + heads + one_token + splits + chosen + weights


def _of_half_rows(node):
    """Whether prompts may attend to rows of 512 + 64 float16.

    They are made for that (cuda/chosen/attend_chosen.py).
    """
    if node.op in ("dense_attention", "sparse_attention"):
        return (node.args[0].tail[1], node.args[1].tail[1]) == (512, 576)
    if node.op not in ("mha_attention", "mha_sparse_attention"):
        return False
    _, kv_lora, n_nope = node.args[-4].shape
    return (kv_lora, node.args[1].tail[1] - n_nope) == (512, 64)


def _cuda_half_rows(nodes, n_ctx):
    """Bytes of n_ctx rows of float16, which all layers share."""
    return 2 * 576 * n_ctx if any(map(_of_half_rows, nodes)) else 0


def tokens_scored_by_gpu(n_kv):
    """How many tokens a GPU scores n_kv keys for at a time.

    Their scores take SCORE_BYTES at most, if that is enough for SCORED_AT_LEAST tokens. Above BLOCKS they are multiples of it: a block
    chooses from the scores of one token. Even, as two tokens are scored together.
    """
    fit = SCORE_BYTES // (4 * max(1, n_kv))
    return max(SCORED_AT_LEAST, fit // BLOCKS * BLOCKS if fit >= BLOCKS else fit // 2 * 2)


def _splits(n_head, n_v):
    """Bytes of the parts of attention sums, where keys are divided.

    There are as many parts as make BLOCKS blocks of at most 64 heads and 512 values.
    """
    return 4 * BLOCKS * min(n_head, 64) * (min(n_v, 512) + 2)


def _parts_of_one_token(n_head, n_v, n_keys):
    """Bytes of the parts of one token's attention to chosen keys.

    A part has 32 keys at least.
    """
    return 4 * -(-n_keys // 32) * n_head * (n_v + 2)


def _packed_heads(n_tokens, n_head, width):
    """Bytes of packed queries.

    They are in whole tiles of sixteen heads and in steps of 32 values, with one more step for a second part. A head has two scales.
    """
    return n_tokens * (-(-n_head // 16) * 16 * (-(-width // 32) + 1) * 64 + 8 * n_head)


DEVICES = {
    "cpu": Device("pydsa.backends.cpu", 4, _cpu_weights, packed_latents=_cpu_packed_latents, side_by_side=True,
                  scored_together=lambda n_kv: SCORED_BY_THREADS, maps=True, places=True, reproducible=True),
    # A grid has at most 65,535 blocks in y and in z, which kernels use for tokens.
    "cuda": Device("pydsa.backends.cuda", 4, lambda tensors: (0, _n_bytes(tensors)), 32768, tokens_scored_by_gpu, _cuda_scratch,
                   packed_latents=_cuda_packed_latents, copies_blocks=True, described=True, numbered=True, streams=True, bus=True,
                   apart=40, precisions=True, half_rows=_cuda_half_rows, reserved=640 << 20),     # 420 to 560 MiB are a context's
    "reference": Device("pydsa.backends.reference", 8, lambda tensors: (_mapped(tensors), _as_floats(tensors)), streams=True),
}


def check_numba():
    """Raise PydsaError if the environment lets Numba compile nothing."""
    if os.environ.get("NUMBA_DISABLE_JIT", "").strip() not in ("", "0"):
        raise PydsaError("NUMBA_DISABLE_JIT is set, but kernels run only as compiled: unset it (--device reference has none).")
    text = os.environ.get("NUMBA_NUM_THREADS", "").strip()
    if text.lstrip("-").isdecimal() and int(text) < 1:
        raise PydsaError(f"NUMBA_NUM_THREADS is {text}, expected a number from 1 on.")


def watch_maps(devices=None):
    """Let this process outlive pages that files lose while they are mapped.

    Where Numba compiles nothing, and where the system is not Linux, it ends. devices: names of those that read the file; the reference
    alone needs no Numba.
    """
    if devices is not None and all(device_of(name).module == DEVICES["reference"].module for name in devices):
        return
    if os.environ.get("NUMBA_DISABLE_JIT", "").strip() in ("", "0"):
        from pydsa.backends.cpu import lost_pages
        lost_pages.watch()


def device_of(name):
    """The Device of a name such as "cpu", "cuda" or "cuda1"."""
    return DEVICES[name.rstrip("0123456789")]


def backend_of(name, precision=PRECISIONS[0]):
    """The backend of a device, imported on the first call.

    precision: that of its products, where it has several.
    """
    device, index = device_of(name), name.lstrip("abcdefghijklmnopqrstuvwxyz")
    backend = device.backend()
    if device.precisions and precision != PRECISIONS[0]:
        return backend.on(int(index or 0), precision)
    return backend.on(int(index)) if index else backend


def usable_gpus(asked_for=True):
    """The GPUs that a model could run on: {name of a device: gpus.Usable}.

    {} where there is none; nothing is raised. asked_for: False: none of Numba's simulator, unless PYDSA_SIMULATED_GPUS asks for them.
    """
    from pydsa.backends import gpus
    if gpus.SIMULATED and not asked_for and "PYDSA_SIMULATED_GPUS" not in os.environ:
        return {}
    return {_numbered(gpu.index): gpu for gpu in gpus.usable_gpus()}


def simulated_gpus(sizes):
    """GPUs of given sizes in bytes, as usable_gpus() has those of a machine."""
    from pydsa.backends.gpus import Usable
    return {_numbered(i): Usable(i, "a GPU as given", size, size) for i, size in enumerate(sizes)}


def _numbered(index):
    kind = next(name for name, device in DEVICES.items() if device.numbered)
    return kind + (str(index) if index else "")


def check_devices(device, what="device"):
    """The names of the devices in a text, with commas between, or in a list.

    A GPU has its number behind the name, cuda1; the first is cuda. Raises PydsaError for what is none, or is named twice. what: where the
    names come from, for errors.
    """
    names = device.split(",") if isinstance(device, str) else device
    if not isinstance(names, (list, tuple)) or not names:
        raise PydsaError(f"{what} is {device!r}, expected {EXPECTED}.")
    found = [_device_name(what, device, name, EXPECTED) for name in names]
    if len(set(found)) < len(found):
        raise PydsaError(f"{what} is {device!r}, expected different devices.")
    return tuple(found)


def check_device(what, name):
    """The name of the one device that `what`, in words, may name."""
    return _device_name(f"the device of {what}", name, name, ONE)


def _device_name(what, given, name, expected):
    plain = name.strip().lower() if isinstance(name, str) else ""
    index = plain.lstrip("abcdefghijklmnopqrstuvwxyz")
    kind = plain.removesuffix(index)
    if kind not in DEVICES or index and not (DEVICES[kind].numbered and index.isascii() and index.isdigit() and len(index) < 4):
        raise PydsaError(f"{what} is {given!r}, expected {expected}.")
    return kind + (str(int(index)) if index.strip("0") else "")


ONE = f"one of {', '.join(map(repr, DEVICES))}, or 'cuda1' for the second GPU"
EXPECTED = f"{ONE}, or several with commas between, or {AUTO!r}"


def check_reproducible(names, wanted):
    """Return `wanted`, whether a model shall be reproducible.

    Raises PydsaError if it is no bool, or if it is true and one of the devices of these names cannot.
    """
    if not isinstance(wanted, bool):
        raise PydsaError(f"reproducible is {wanted!r}, expected True or False.")
    for name in names:
        if wanted and not device_of(name).reproducible:
            able = " or ".join(other for other, device in DEVICES.items() if device.reproducible)
            raise PydsaError(f"{name} cannot promise a token the same bits in all steps: use --device {able}, or leave out "
                             "--reproducible.")
    return wanted


def check_residence(names, mmap, mlock):
    """Return whether weights are mapped, and whether they are locked.

    Raises PydsaError if one of them is no bool, or if each of the devices of these names has its own copies of them.
    """
    for what, value in (("mmap", mmap), ("mlock", mlock)):
        if not isinstance(value, bool):
            raise PydsaError(f"{what} is {value!r}, expected True or False.")
    if (mlock or not mmap) and not any(device_of(name).maps for name in names):
        raise PydsaError(f"{names[0]} has its own copy of the weights: leave out {'--mlock' if mlock else '--no-mmap'}.")
    return mmap, mlock


def check_numa(names, word):
    """Return `word`, how threads and memory are placed on nodes, or None.

    Raises PydsaError if it is unknown, or if none of the devices of these names has threads and memory that can be placed.
    """
    if word is not None and not any(device_of(name).places for name in names):
        able = " or ".join(other for other, device in DEVICES.items() if device.places)
        raise PydsaError(f"--numa is for the threads and the memory of {able}, and {names[0]} has its own: leave it out.")
    return None if word is None else choose("numa", word, WORDS)
