"""Placement: on which device each node of a graph, each weight and each cache is.

A layer has a home, where its caches are and its nodes run; rules on the names of weights send the nodes of these weights elsewhere. The
graph and the kernels do not know about it: segments.py cuts the graph where the device changes.
"""
import bisect
import re

import numpy as np

from pydsa.backends.devices import HOST, check_device, device_of
from pydsa.errors import PydsaError
from pydsa.executor.graph import CacheRef
from pydsa.executor.hooks import layer_of
from pydsa.gguf.file import Tensor

EXPERTS = r"\.ffn_(up|down|gate|gate_up)_exps"      # names of the routed experts' weights: what --cpu-moe sends to the CPU
FIRST = r"^blk\.("           # how patterns for the first layers begin
MOST_LAYERS = 2**31 - 1     # as a number: more than there are are all
RULES = re.compile(r"(.+?)=\s*([A-Za-z]+[0-9]*)\s*(?:,|$)")     # of one text: commas may also be inside of a regular expression
ALL = "all"         # as a number of layers
FOLLOWING = ("silu_mul", "scale", "expert_scale", "rope", "hadamard")      # ops that run where their input was made


class Placement:
    """The device of each node, weight and cache of a model.

    layers: the name of each layer's device (devices.DEVICES), from layer `first` on, that of a stage. The embedding is beside the first
    layer, the output beside the last. rules: pairs of a compiled regular expression and the name of a device, for weights whose name it
    matches, anywhere; the first one counts.
    """

    def __init__(self, layers, rules=(), first=0):
        self.layers, self.rules, self.first = tuple(layers), tuple(rules), first

    def home(self, layer):
        """The device of a layer; 0 is also the first of all, and -1 the last."""
        return self.layers[layer if layer < 0 else max(0, layer - self.first)]

    @property
    def devices(self):
        """The names of all devices, in the order of the layers."""
        return tuple(dict.fromkeys((*self.layers, *(device for _, device in self.rules))))

    def of_cache(self, ref):
        """The device of a cache (CacheRef): that of its layer."""
        return self.home(ref.layer)

    def of_nodes(self, nodes, streaming=False):
        """The device of each of a graph's nodes, a list of names.

        A node with a cache runs beside it. One with a weight goes where a rule sends the weight, else to the layer's home. streaming: those
        whose weights are streamed() run at home too.
        """
        found, written = [], {}     # root Value -> the device that wrote it last
        for node in nodes:
            device = self._home(node) if streaming and self.streamed(node) else self._of_node(node, written)
            written.update((node.args[i].root, device) for i in node.writes if not isinstance(node.args[i], CacheRef))
            found.append(device)
        return found

    def _of_node(self, node, written):
        if node.of_one_context:
            return next(self.of_cache(a) for a in node.args if isinstance(a, CacheRef))
        home = self._home(node)
        if node.op in FOLLOWING:
            return written.get(node.args[node.n_out].root, home)
        tensor = next((a for a in node.args if isinstance(a, Tensor)), None)
        return home if tensor is None else self._by_rule(tensor.name) or home

    def _home(self, node):
        """The device of a node's layer."""
        return self.home(home_layer(node))

    def streamed(self, node):
        """The weights of a node that its layer's device can take for a step.

        They are experts' matrices that a rule keeps in the mapped file, while the layer's device can take them (devices.Device.streams). An
        empty tuple: none, as for the few rows whose logits are wanted.
        """
        tensors = tuple(a for a in node.args if isinstance(a, Tensor) and len(a.shape) == 3)
        if not tensors or not is_of_experts(tensors[0].name) or node.for_outputs or self._by_rule(tensors[0].name) != HOST:
            return ()
        return tensors if device_of(self._home(node)).streams else ()

    def _by_rule(self, name):
        return next((device for pattern, device in self.rules if pattern.search(name)), None)

    def of_weight(self, name, layer):
        """The device of a weight whose nodes belong to a layer."""
        return self._by_rule(name) or self.home(layer)

    def check_rules(self, names):
        """Raise PydsaError for a rule that matches none of the names of weights."""
        for pattern, device in self.rules:
            if any(map(pattern.search, names)):
                continue
            if pattern.pattern == EXPERTS:
                raise PydsaError("The model has no routed experts: leave out --cpu-moe.")
            if pattern.pattern.endswith(EXPERTS) and pattern.pattern.startswith(FIRST):
                raise PydsaError("n_cpu_moe covers only layers without routed experts: give a larger number, or --cpu-moe for all.")
            raise PydsaError(f"No weight of the model has a name that matches {pattern.pattern!r} (to be on {device}): "
                             "`pydsa info` tells the layers, names are like blk.3.ffn_up_exps.weight.")


def is_of_experts(name):
    """Whether a weight of this name is of routed experts."""
    return re.search(EXPERTS, name) is not None


def home_layer(node):
    """The index of the layer beside which a node runs; -1: the last."""
    layer = layer_of(node) if node.name else next((layer_of(a) for a in node.args[:1] if a.name), None)
    return layer if layer is not None else -1 if node.for_outputs else 0


class Placing:
    """What is asked for: place(layers) makes the Placement of a model.

    devices: names. tensor_split: the proportion of the layers that each device gets, in ranges; None: equal ones. n_gpu_layers: the number
    of layers, at the end, that are on these devices, while the others are on the CPU; None or "all": all. cpu_moe: whether the routed
    experts of all layers are on the CPU; n_cpu_moe: those of so many layers, from the first on, or of all there are. override_tensor: pairs
    of a regular expression and a device, or texts "REGEX=DEVICE" with commas between several; they come before these. All as in llama.cpp.
    Raises PydsaError for what cannot be.
    """

    def __init__(self, devices, tensor_split=None, n_gpu_layers=None, cpu_moe=False, n_cpu_moe=0, override_tensor=()):
        self.devices, self.tensor_split = tuple(devices), _shares(devices, tensor_split)
        self.n_gpu_layers = check_layers(n_gpu_layers)
        if self.n_gpu_layers not in (None, ALL, 0) and HOST in devices:
            raise PydsaError(f"n_gpu_layers is {n_gpu_layers!r}, but {HOST} is among the devices: name only GPUs, or leave out -ngl.")
        self.n_cpu_moe = _from_0("n_cpu_moe", 0 if n_cpu_moe is None else n_cpu_moe)
        if not isinstance(cpu_moe, bool):
            raise PydsaError(f"cpu_moe is {cpu_moe!r}, expected True or False.")
        self.cpu_moe, self.rules = cpu_moe, _rules(override_tensor)

    def changed(self, **options):
        """A Placing with other values of some options."""
        mine = dict(devices=self.devices, tensor_split=self.tensor_split, n_gpu_layers=self.n_gpu_layers, cpu_moe=self.cpu_moe,
                    n_cpu_moe=self.n_cpu_moe, override_tensor=self.rules)
        return Placing(**mine | options)

    def place(self, layers):
        """The Placement of a range of layers: those of a model, or of a stage.

        Numbers of layers count from the ends of the range.
        """
        n_layer = len(layers)
        n = n_layer if self.n_gpu_layers in (None, ALL) else min(self.n_gpu_layers, n_layer)
        shares = self.tensor_split or [1.0] * len(self.devices)
        ends = [sum(shares[:i + 1]) / sum(shares) for i in range(len(shares) - 1)]
        homes = [HOST] * (n_layer - n) + [self.devices[bisect.bisect(ends, (i + 0.5) / n)] for i in range(n)]
        rules = list(self.rules)
        if self.cpu_moe:
            rules.append((re.compile(EXPERTS), HOST))
        elif self.n_cpu_moe:
            rules.append((re.compile(rf"{FIRST}{'|'.join(map(str, layers[:self.n_cpu_moe]))}){EXPERTS}"), HOST))
        return Placement(homes, rules, layers.start)


def check_layers(n_gpu_layers):
    """The number of layers on GPUs, ALL, or None for what fits."""
    return n_gpu_layers if n_gpu_layers is None or isinstance(n_gpu_layers, str) and n_gpu_layers == ALL else (
        _from_0("n_gpu_layers", n_gpu_layers, f", {ALL!r} or None"))


def _from_0(what, n, others=""):
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 0 <= n <= MOST_LAYERS:
        raise PydsaError(f"{what} is {n!r}, expected an integer from 0 to {MOST_LAYERS}{others}.")
    return int(n)


def _shares(devices, tensor_split):
    """The numbers of a split, one for each device; None without one."""
    split = check_split(tensor_split)
    if split is not None and len(split) != len(devices):
        raise PydsaError(f"tensor_split has {len(split)} numbers, expected {len(devices)}, one for each of {', '.join(devices)}.")
    return split


def check_split(tensor_split):
    """The numbers of a split, given as a list or a text; None without one."""
    if tensor_split is None:
        return None
    split = tensor_split.split(",") if isinstance(tensor_split, str) else tensor_split
    try:
        split = [float(n) for n in split]
    except (TypeError, ValueError):
        split = [-1]
    if not all(0 <= n < float("inf") for n in split) or not sum(split):
        raise PydsaError(f"tensor_split is {tensor_split!r}, expected numbers from 0 on, not all 0, one for each device.")
    return split


def _rules(given):
    """Pairs of a compiled regular expression and the name of a device."""
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, (list, tuple, type(None))):
        raise PydsaError(f"override_tensor is {given!r}, expected a list of texts REGEX=DEVICE, such as exps=cpu.")
    found = []
    for rule in _apart(given or ()):
        pattern, device = rule.rpartition("=")[::2] if isinstance(rule, str) else rule if _is_pair(rule) else (None, None)
        if not pattern or not isinstance(pattern, (str, re.Pattern)):
            raise PydsaError(f"override_tensor has {rule!r}, expected REGEX=DEVICE, such as exps=cpu.")
        found.append((_compiled(pattern), check_device("override_tensor", device)))
    return found


def _is_pair(rule):
    return isinstance(rule, (list, tuple)) and len(rule) == 2


def _apart(given):
    """The rules one by one: a text may have several."""
    for rule in given:
        several = RULES.findall(rule) if isinstance(rule, str) else []
        whole = len(several) > 1 and len(RULES.sub("", rule)) == 0
        yield from several if whole else [rule]


def _compiled(pattern):
    try:
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise PydsaError(f"{pattern!r} is no regular expression ({error}); names of weights are like blk.3.ffn_up_exps.weight.") from None
