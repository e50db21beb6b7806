"""The search for a placement: which layers and experts go to GPUs of given sizes.

A Setup is placed by what its graphs and the shapes of its weights say; no GPU is touched. Of the placements that fit, the one with the
most on the GPUs is taken: all; else the routed experts of the first N layers on the CPU, N as small as possible; else those of all layers,
and as many layers at the end on the GPUs as fit.
"""
import bisect
from typing import NamedTuple

from pydsa.backends.devices import HOST, device_of
from pydsa.executor.placement import home_layer, is_of_experts
from pydsa.gguf.file import Tensor


class Room(NamedTuple):
    """The memory of a device, in bytes."""
    title: str
    total: int
    free: int | None        # None: not known, and not checked


class Share(NamedTuple):
    """What a device has of a model, in bytes.

    mapped: weights that are read where the file is mapped. weights: those that the device copies. caches: of all conversations. scratch:
    intermediate values, scores and the like. reserved: for the driver and the kernels' code. free: what is left of the room, less than
    nothing where it does not fit; None: not known.
    """
    device: str
    title: str
    mapped: int
    weights: int
    caches: int
    scratch: int
    reserved: int
    free: int | None

    @property
    def total(self):
        """All but the mapped weights."""
        return self.weights + self.caches + self.scratch + self.reserved


class Fit:
    """What a placement of a Setup takes, beside the room that there is.

    rooms: {name of a device: Room}. margin: bytes to leave free on each GPU beside what is reserved; None: neither is left. n_sessions:
    conversations with caches of their own.
    """

    def __init__(self, setup, rooms, margin=0, n_sessions=1):
        self.setup, self.rooms, self.margin, self.n_sessions = setup, rooms, margin, n_sessions
        self.uses = _uses(setup)

    def shares(self, setup):
        """The Share of each device of a placed Setup."""
        found = [share_of(name, memory, self.rooms.get(name), self.n_sessions) for name, memory in setup.memory.items()]
        on_host = sum(share.total for share in found if not device_of(share.device).reserved)
        return tuple(share if share.free is None or device_of(share.device).reserved else
                     share._replace(free=share.free + share.total - on_host) for share in found)

    def missing(self, setup):
        """{device: bytes that it lacks} of a placed Setup; {} if it fits."""
        return self.lacking({share.device: share.total for share in self.shares(setup)})

    def lacking(self, taken):
        """{device: bytes that it lacks} to hold {device: bytes}.

        Devices without memory of their own share the host's, and come last.
        """
        free = {name: room.free for name, room in self.rooms.items() if room.free is not None}
        own = {name: n + self._spare(name) - free[name] for name, n in taken.items() if device_of(name).reserved and name in free}
        on_host = sum(n for name, n in taken.items() if not device_of(name).reserved)
        return {name: n for name, n in (own | ({HOST: on_host - free[HOST]} if HOST in free else {})).items() if n > 0}

    def layer_bytes(self, placing):
        """Weights and caches by layer, and those that rules send to a GPU.

        Bytes of each layer on its home, if that has memory of its own, and {device: bytes}.
        """
        setup, placement = self.setup, placing.place(self.setup.layers)
        sizes, fixed, seen = [0] * len(placement.layers), {}, set()
        for tensor, layer, pinned in self.uses:
            home = placement.home(layer)
            name = home if pinned else placement.of_weight(tensor.name, layer)
            if not device_of(name).reserved or (name, tensor.name) in seen:
                continue
            seen.add((name, tensor.name))
            n_bytes = device_of(name).weights([tensor])[1]
            if name == home:
                sizes[layer - setup.layers.start] += n_bytes
            else:
                fixed[name] = fixed.get(name, 0) + n_bytes
        for ref, n_bytes in setup.cache_row_bytes.items():
            if device_of(placement.of_cache(ref)).reserved:
                sizes[ref.layer - setup.layers.start] += n_bytes * setup.n_ctx * self.n_sessions
        return sizes, fixed

    def _spare(self, name):
        return -device_of(name).reserved if self.margin is None else self.margin

    def room(self, name, beside):
        """Bytes for weights and caches on a GPU, with `beside` for the rest."""
        free = self.rooms[name].free if name in self.rooms else None
        return float("inf") if free is None else free - self._spare(name) - device_of(name).reserved - beside.get(name, 0)

    def filled(self, placing, beside):
        """How full the fullest GPU is, and how the layers are split.

        1: exactly full. The split has the number of layers for each of the placing's devices; with a split of the user's it is that one.
        beside: {device: bytes of values, scratch and so on}.
        """
        sizes, fixed = self.layer_bytes(placing)
        layers, gpus = placing.place(self.setup.layers).layers, placing.devices
        rooms = {name: self.room(name, beside) - fixed.get(name, 0) for name in gpus}
        if len(gpus) > 1 and placing.tensor_split is None and HOST not in gpus:
            return balanced([n for n, name in zip(sizes, layers) if name in gpus], list(rooms.values()))
        taken = {name: sum(n for n, home in zip(sizes, layers) if home == name) for name in gpus}
        return max(_ratio(n, rooms[name]) for name, n in taken.items()), None


def _ratio(n_bytes, room):
    if room > 0:
        return n_bytes / room
    return 0.0 if n_bytes == room == 0 else float("inf")


def balanced(sizes, rooms):
    """Ranges of layers for devices, which are filled as evenly as can be.

    sizes: bytes of each layer; rooms: of each device -> how full the fullest is, and the number of layers of each (None if there is no
    room at all).
    """
    known = max([room for room in rooms if room < float("inf")], default=0)
    rooms = [max(0, min(room, max(known, sum(sizes)))) for room in rooms]       # one that is not known is as large as the others
    if not max(rooms):
        return float("inf"), None
    low, high = 0.0, max(1.0, sum(sizes) / max(rooms) * (1 + 1e-9))     # at `high` one device holds all that is left for it
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _ranges(sizes, rooms, middle) else (middle, high)
    return high, _ranges(sizes, rooms, high)


def _ranges(sizes, rooms, ratio):
    """The number of layers of each device, in order; None if some are left."""
    found, at = [], 0
    for room in rooms:
        first, taken = at, 0
        while at < len(sizes) and taken + sizes[at] <= ratio * room:
            taken, at = taken + sizes[at], at + 1
        found.append(at - first)
    return found if at == len(sizes) else None


def _uses(setup):
    """(weight, layer of a node that uses it, whether it is beside a cache)."""
    found = {}
    for graph in setup.graphs.values():
        for node in graph.nodes:
            for a in node.args:
                if isinstance(a, Tensor):
                    found[a.name, _layer(setup, node), node.of_one_context] = a
    return [(tensor, layer, pinned) for (_, layer, pinned), tensor in found.items()]


def _layer(setup, node):
    """The layer beside which a node runs, one of the setup's."""
    layer = home_layer(node)
    return setup.layers[-1] if layer < 0 else max(layer, setup.layers.start)


def share_of(name, memory, room, n_sessions=1):
    """The Share of a device with a memory.Memory in a Room, or None."""
    device, more = device_of(name), (n_sessions - 1) * memory.caches
    share = Share(name, room.title if room else "", memory.mapped, memory.copied, memory.caches + more,
                  memory.total - memory.copied - memory.caches, device.reserved, None)
    return share._replace(free=room.free - share.total) if room and room.free is not None else share


class Search:
    """Finds the placement with the most on the GPUs that fits.

    fit: a Fit. placing: what the user asked for, on the GPUs; what it leaves open is searched.
    """

    def __init__(self, fit, placing):
        self._fit, self._placing, self._n_layer = fit, placing, len(fit.setup.layers)
        self._with_experts = sorted({layer - fit.setup.layers.start for tensor, layer, _ in fit.uses if is_of_experts(tensor.name)})
        self._beside, self._setups = {}, {}     # bytes on each GPU beside weights and caches, as far as known; placed Setups

    def candidates(self):
        """Options for Placing, from the most on the GPUs to the least."""
        asked, n_layer = self._placing, self._n_layer
        if asked.cpu_moe or asked.n_cpu_moe:
            moe = [dict(cpu_moe=asked.cpu_moe, n_cpu_moe=asked.n_cpu_moe)]
        else:
            moe = [{}, *(dict(n_cpu_moe=layer + 1) for layer in self._with_experts[:-1]),
                   *([dict(cpu_moe=True)] if self._with_experts else [])]
        if asked.n_gpu_layers is not None:      # "all" among them
            return [options | dict(n_gpu_layers=asked.n_gpu_layers) for options in moe]
        return moe + [moe[-1] | dict(n_gpu_layers=n) for n in reversed(range(1, n_layer))]

    def placing(self, options):
        """The Placing of a candidate, whose layers are split over the GPUs."""
        found = self._placing.changed(**options)
        _, split = self._fit.filled(found, self._beside)
        if split is None:
            return found
        names = [name for name, n in zip(found.devices, split) if n]
        return found.changed(devices=tuple(names), tensor_split=[n for n in split if n] if len(names) > 1 else None)

    def run(self):
        """The placed Setup, or None if nothing fits on the GPUs."""
        options = self.candidates()
        at = min(self._first(options, 0), len(options) - 1)
        if not self._fits(options[at]):
            self._learn(options[at])
            at = min(self._first(options, at + 1), len(options) - 1)        # the figures may be too high: it is a place to begin
        while at < len(options) and not self._fits(options[at]):
            self._learn(options[at])
            at += 1
        while 0 < at < len(options) and self._fits(options[at - 1]):
            at -= 1
        return self._setup(options[at]) if at < len(options) else None

    def least(self):
        """The placed Setup of the candidate with the least on the GPUs."""
        return self._setup(self.candidates()[-1])

    def _first(self, options, start):
        """The first candidate from start on whose weights and caches fit."""
        return bisect.bisect_left(options, True, lo=min(start, len(options)),
                                  key=lambda one: self._fit.filled(self._placing.changed(**one), self._beside)[0] <= 1)

    def _setup(self, one):
        key = tuple(sorted(one.items()))
        if key not in self._setups:
            self._setups[key] = self._fit.setup.placed(self.placing(one))
        return self._setups[key]

    def _fits(self, one):
        return not self._fit.missing(self._setup(one))

    def _learn(self, one):
        """Keep what a placement takes on each GPU beside weights and caches."""
        self._beside = {name: memory.total - memory.copied - memory.caches for name, memory in self._setup(one).memory.items()}
        self._setups = {}       # other splits come of it
