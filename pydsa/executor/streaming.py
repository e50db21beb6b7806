"""Weights that are copied to a device for steps of many tokens.

Experts that lie in the mapped file run where the file is, on the CPU. A step of enough tokens uses nearly all of them for many tokens each:
then it takes less time to copy them to the GPU, a matrix after the other, and to multiply there. Each role of a weight, such as "the up
matrices of the experts", has one slot on the device: while one layer's matrix is used, those of the other roles are on their way, and the
next layer's follows as soon as the slot is free. So the copies never wait, and are in the order of their use.
"""
import bisect
from typing import NamedTuple

import numpy as np

from pydsa.backends.devices import HOST, device_of
from pydsa.errors import PydsaError
from pydsa.executor.costs import StepSize, node_cost
from pydsa.options import size
from pydsa.quants import TYPES

WORTH = 64 << 20    # bytes of experts from which on it is worth a second to measure whether copies pay: fewer are no large part of a step
MANY = 512          # tokens of a step whose products have the form of many
REACHED = 0.5       # of the peak rate of products: what products of experts reach, with few tokens an expert


def role(name):
    """What a weight is in its layer: its name without "blk.N."."""
    return name.split(".", 2)[2]


def slots_of(layouts):
    """The bytes of the slots on each device: {device: {role: bytes}}.

    layouts: of steps whose weights are copied (layout.Layout). A slot holds the largest weight of its role.
    """
    found = {}
    for layout in layouts:
        for device, _, tensor in layout.arrivals:
            slots, n_bytes = found.setdefault(device, {}), device_of(device).weights([tensor])[1]
            slots[role(tensor.name)] = max(n_bytes, slots.get(role(tensor.name), 0))
    return found


class Streaming(NamedTuple):
    """How steps of many tokens run.

    layouts: {variant: Layout} in which experts run beside their layer. slots: those of slots_of(). stream_from: the least tokens of a step
    that takes them; 0: none does; None: what pays is still to be measured.
    """
    layouts: dict
    slots: dict
    stream_from: int | None

    def takes(self, n_tokens):
        """Whether weights are copied for a step of n_tokens tokens."""
        return 0 < (self.stream_from or 0) <= n_tokens

    @property
    def arrivals(self):
        """(device, Node, Tensor) of each weight that is copied, in any variant."""
        return next((layout.arrivals for layout in self.layouts.values()), [])

    def n_bytes(self, n_tokens):
        """Bytes that a step of n_tokens tokens of a prompt copies, {device: bytes}.

        Its last layer may end early, as it does in the last of the layouts.
        """
        found = dict.fromkeys(self.slots, 0)
        for device, _, tensor in [*self.layouts.values()][-1].arrivals if self.takes(n_tokens) else ():
            found[device] += tensor.data.nbytes
        return found


NEVER = Streaming({}, {}, 0)


class Delivery:
    """The copy of a weight to a slot, made again in each step.

    first: whether it is the first of a step into its slot, which starts with the step. The others start when their slot is free.
    """

    def __init__(self, slot, tensor, first):
        self._slot, self._tensor, self.first = slot, tensor, first
        self._filling, self.following = None, None

    def start(self):
        """Begin to copy: the slot is free, or will be when its device is."""
        self._filling = self._slot.fill(self._tensor)

    def finish(self):
        """Let the device see the weight in what it does from now on."""
        self._filling.ready()

    def settle(self):
        """Give the slot to the next weight, behind what the device does by now."""
        self.abandon()
        if self.following is not None:
            self.following.start()

    def abandon(self):
        """Give the slot back."""
        if self._filling is not None:
            self._slot.release()
            self._filling = None


def deliveries(needs):
    """A Delivery for each (slot, tensor), which are in the order of use."""
    last, found = {}, []
    for slot, tensor in needs:
        before = last.get(slot)
        last[slot] = Delivery(slot, tensor, before is None)
        if before is not None:
            before.following = last[slot]
        found.append(last[slot])
    return found


def check_stream_from(n):
    """Return n, the tokens of a step from which on experts are streamed.

    Raises PydsaError if it is neither an integer from 0 on nor None.
    """
    if n is not None and (not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 0):
        raise PydsaError(f"stream_from is {n!r}, expected tokens of a step, an integer from 0 (never) on, or None.")
    return n if n is None else int(n)


def bytes_for_slots(streamed, other):
    """Bytes of slots, and of the values of what multiplies with them.

    streamed, other: Setups of one placement, with slots and without.
    """
    return sum(streamed.memory[name].total - other.memory[name].total for name in streamed.streaming.slots)


def no_room_for_slots(n_bytes):
    """A sentence: no experts are streamed, as n_bytes for it do not fit."""
    return (f"The experts of the CPU are not copied to the GPU for prompts: slots and values for that, {size(n_bytes)}, do not "
            "fit there beside the rest.")


class Rates(NamedTuple):
    """What a machine does in a second, as far as it decides about copies.

    bus: {device: bytes that are copied to it}. bandwidth: bytes that the host's cores read. peak: operations of products that they do; a
    multiply-add is two.
    """
    bus: dict
    bandwidth: float
    peak: float


# of a machine that is not at hand: bytes and bandwidth were measured beside an H200, with PCIe 5 and sixteen cores
ASSUMED_BUS, ASSUMED = 55e9, Rates({}, 106e9, 3e12)


def worth_measuring(weights):
    """Whether weights are so large that it is measured if copies pay."""
    return sum(w.data.nbytes for w in weights) >= WORTH


def measure(streaming, backends, threads):
    """The Rates of this machine; None where a bus cannot be measured.

    backends: {name of a device: backend}. threads: those of steps of many tokens. It takes a second, for the host's cores.
    """
    host = backends[HOST]
    bus = {name: backends[name].measure_bus(max(slots.values())) for name, slots in streaming.slots.items()}      # so much is free
    if not all(bus.values()):       # of a simulated GPU
        return None
    node, tensor = streaming.arrivals[0][1:]
    ceilings, kind = host.measure_ceilings(threads), host.product_format(node.op, TYPES[tensor.type].quantized, MANY)
    return Rates({name: rate.streamed for name, rate in bus.items()}, ceilings.bandwidth, ceilings.peaks[kind])


def pays_from(arrivals, rates, most):
    """The least tokens of a step for which copies take less time; 0: none.

    The host takes the time to read the experts that are chosen, or to multiply with them, whichever is longer; copies that of all bytes
    over the bus, while the device multiplies. arrivals: Streaming.arrivals. most: the tokens of the longest step. Experts are taken to be
    chosen evenly.
    """
    seconds = sum(tensor.data.nbytes / rates.bus[device] for device, _, tensor in arrivals)
    if not seconds or _on_host(arrivals, rates, most) < seconds:
        return 0
    return bisect.bisect_left(range(most + 1), seconds, key=lambda n: _on_host(arrivals, rates, n))


def _on_host(arrivals, rates, n_tokens):
    """Seconds of the nodes of streamed weights on the host."""
    seconds = 0.0
    for node, n_expert in {id(node): (node, tensor.shape[0]) for _, node, tensor in arrivals}.values():
        ids = node.args[2]
        chosen = n_expert * (1 - (1 - ids.tail[0] / n_expert) ** n_tokens)
        cost = node_cost(node, StepSize(n_tokens, 0, {}, {ids: chosen}))
        seconds += max(cost.weights / rates.bandwidth, cost.operations / (REACHED * rates.peak))
    return seconds
