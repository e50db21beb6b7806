"""Fitting: a Setup whose placement fits the memory of its devices, and its plan.

fitted(path, device="auto") chooses the placement; for devices that are named it checks whether they have room. Nothing is loaded, and no
GPU is touched. longest_context() is for `-c 0`.
"""
import functools
import os
import warnings
from typing import NamedTuple

from pydsa.backends.devices import AUTO, HOST, backend_of, check_devices, check_numa, device_of, usable_gpus
from pydsa.errors import LESS, OutOfMemoryError
from pydsa.executor.fit import Fit, Room, Search
from pydsa.executor.placement import check_layers, check_split, is_of_experts
from pydsa.executor.streaming import bytes_for_slots, no_room_for_slots
from pydsa.machine import limits
from pydsa.options import counts, size_in_bytes
from pydsa.setup import Setup
from pydsa.words import options_in_words, placement_in_words, size

MARGIN = 1 << 30        # bytes that an automatic plan leaves free on each GPU
MOST_SESSIONS = 1024
DEVICE = "PYDSA_DEVICE"     # the environment variable with the devices that "auto" stands for
NO_LAYERS = "n_gpu_layers 0"        # a reason for which no GPU is used that needs no word
LEAST = 4096        # tokens of a context for which layers are left on the CPU rather than a shorter one taken
STEP = 256          # tokens; contexts shorter than the model's own are multiples of it
ON_THE_HOST = dict(devices=(HOST,), tensor_split=None, n_gpu_layers=None, cpu_moe=False, n_cpu_moe=0)     # of a Placing
SPARE = 0.1         # of the memory that a context takes, left free beside it where no margin is


class Plan(NamedTuple):
    """Where a model is, and what that takes.

    shares: a fit.Share for each device. options: as the command line has them. where: {device: what it has, in words}. automatic: whether
    fitting chose it. notes: sentences.
    """
    shares: tuple
    options: str
    where: dict
    automatic: bool
    notes: tuple


def fitted(path, **options):
    """The Setup of a file, placed so that it fits its devices.

    options: those of Fitting. Its `plan` is a Plan if it has a GPU or several devices, else None. Raises the errors of Setup, and
    OutOfMemoryError where a device has no room.
    """
    return Fitting(path, **options).setup()


def longest_context(path, **options):
    """The model's own context, or the longest that fits -> (tokens, all).

    options: those of Fitting, without n_ctx. all: whether the model's own fits. On GPUs that a plan fills, it is the longest with all
    layers there and the experts on the CPU, if that has LEAST tokens or more; else layers are left on the CPU, for as long a one as its
    memory holds. Raises the errors of Setup, and OutOfMemoryError if not even 256 tokens fit.
    """
    return Fitting(path, **options).longest_context()


class Fitting:
    """What is asked for, and the room that there is.

    device: as for load(). fit_margin: bytes to leave free on each GPU, or a text such as "1GiB". n_sessions: conversations with caches of
    their own. n_models: how many models share what is free, this one among them. gpus: {device: gpus.Usable} in place of those of this
    machine, whose memory is then not looked at either. settings: the others of Setup.
    """

    def __init__(self, path, device=AUTO, fit_margin=MARGIN, n_sessions=1, n_models=1, gpus=None, **settings):
        self._path, self._settings, self._given = path, settings, gpus
        self._margin = size_in_bytes("fit_margin", fit_margin)
        self._n_sessions, self._n_models = counts(MOST_SESSIONS, n_sessions=n_sessions, n_models=n_models)
        if _is_auto(device):
            device = AUTO if gpus is not None else _by_the_environment()
        self.automatic = _is_auto(device)
        self._left_out = 0      # bytes of slots for experts that did not fit
        self._numa = check_numa((HOST,), settings.pop("numa", None)) if self.automatic else None       # for what is left on the host
        self._device = self._all_gpus() if self.automatic else device

    @functools.cached_property
    def _gpus(self):
        """The GPUs that there are; they are looked for only where it matters."""
        return usable_gpus(asked_for=not self.automatic) if self._given is None else self._given

    def _all_gpus(self):
        """The devices of an automatic plan to begin with."""
        settings = self._settings
        split, n_layers = check_split(settings.get("tensor_split")), check_layers(settings.get("n_gpu_layers"))
        self._settings = settings = settings | dict(tensor_split=split, n_gpu_layers=n_layers)
        for_the_cpu = self._for_the_cpu()
        if for_the_cpu or not self._gpus:
            ignored = [name for name in ("n_gpu_layers", "tensor_split") if settings.get(name) is not None]
            if for_the_cpu == NO_LAYERS:
                pass
            elif for_the_cpu and self._gpus:
                warnings.warn(f"{for_the_cpu}: all runs on the CPU, and no GPU is used unless --device names one.", stacklevel=4)
            elif ignored:
                warnings.warn(f"There is no GPU to use: {' and '.join(ignored)} without effect.", stacklevel=4)
            self._settings = settings | dict.fromkeys(ignored)
            return HOST
        return list(self._gpus)[:split and len(split)]

    def _for_the_cpu(self):
        """The option for which an automatic plan takes no GPU, or None."""
        settings = self._settings
        if settings.get("reproducible"):
            return "reproducible"
        placed = any(settings.get(name) for name in ("tensor_split", "n_gpu_layers", "cpu_moe", "n_cpu_moe", "override_tensor"))
        if not placed and (settings.get("mlock") or not settings.get("mmap", True)):
            return "mlock" if settings.get("mlock") else "no-mmap"
        n = settings.get("n_gpu_layers")
        return NO_LAYERS if n == 0 and not isinstance(n, bool) else None

    def _setup(self, **settings):
        return Setup(self._path, device=self._device, **self._settings | settings)

    def _rooms(self, names):
        """The Room of each device with memory of its own, and of the host."""
        rooms = {name: Room(gpu.name, gpu.total, gpu.free // self._n_models) for name, gpu in self._gpus.items() if name in names}
        host = limits.available().n_bytes if self._given is None else None
        return rooms | {name: Room("memory" if name == HOST else "", 0, host) for name in names if not device_of(name).reserved}

    def _fit(self, setup, margin):
        return Fit(setup, self._rooms((*setup.placement.devices, HOST)), margin, self._n_sessions)

    def setup(self):
        """The placed Setup, with its plan."""
        setup = self._placed()
        if self._numa and any(device_of(name).places for name in setup.placement.devices):
            setup.numa = self._numa
        elif self._numa:
            warnings.warn(f"--numa {self._numa} is without effect: all runs on {setup.device_name}.", stacklevel=3)
        return setup

    def _placed(self):
        setup = self._setup()
        with_gpus = [name for name in setup.placement.devices if device_of(name).reserved]
        if not with_gpus and len(setup.placement.devices) == 1:
            return setup
        # For named devices the figures after their drivers have started decide (Model); what cannot fit is told before.
        fit = self._fit(setup, self._margin if self.automatic else None if self._given is None else 0)
        if self.automatic and with_gpus:
            setup = self._searched(fit, setup)
        else:
            setup = self._checked(fit, setup)
        shares = fit.shares(setup)
        options = options_in_words(setup.placing) + (" --stream-from 0" if self.automatic and self._left_out else "")
        setup.plan = Plan(shares, options, placement_in_words(setup), self.automatic, tuple(self._notes(setup, shares)))
        return setup

    def _searched(self, fit, setup):
        """The Setup with the placement of an automatic plan."""
        found = Search(fit, setup.placing).run()
        if setup.stream_from is None and (found is None or found.slot_bytes and n_on_gpus(found) < len(found.placement.layers)):
            found = self._without_slots(setup, found)
        if found is None and setup.placing.n_gpu_layers is None:
            found = setup.placed(setup.placing.changed(**ON_THE_HOST))
        if found is None:
            setup = setup.streamed_from(0) if setup.stream_from is None else setup      # without slots, which need not fit
            raise self._too_large(fit, Search(self._fit(setup, self._margin), setup.placing).least())
        if fit.missing(found):
            raise self._too_large(fit, found)
        return found

    def _without_slots(self, setup, found):
        """What is found without slots for experts, if it has more on the GPUs.

        Layers that leave the GPUs for the slots' sake cost more than what the slots bring. But some experts on the GPUs bring less: all are
        on the CPU, so that more memory never puts less there.
        """
        moe = {} if setup.placing.cpu_moe or setup.placing.n_cpu_moe else dict(cpu_moe=any(map(is_of_experts, setup.weights.used)))
        other = Search(self._fit(setup.streamed_from(0), self._margin), setup.placing.changed(**moe)).run()
        if other is None or found is not None and n_on_gpus(other) <= n_on_gpus(found):
            return found
        self._left_out = bytes_for_slots(other.streamed_from(None), other)
        return other

    def _checked(self, fit, setup):
        """The Setup on devices that were named; they must have room.

        The layers are split over several GPUs by their free memory, unless the user gave a split.
        """
        placing = setup.placing
        if all(device_of(name).reserved and name in fit.rooms for name in placing.devices) and placing.tensor_split is None:
            beside = {name: memory.total - memory.copied - memory.caches for name, memory in setup.memory.items()}
            split = fit.filled(placing, beside)[1]
            if split is not None:
                setup = setup.placed(placing.changed(tensor_split=split))
        if any(device_of(name).reserved for name in fit.missing(setup)):
            if setup.stream_from is None and setup.slot_bytes:
                without = setup.streamed_from(0)
                self._left_out = bytes_for_slots(setup, without)
                return self._checked(fit, without)
            raise self._too_large(fit, setup)
        return setup

    def _too_large(self, fit, setup):
        """The OutOfMemoryError of a placement that does not fit."""
        lacks = fit.missing(setup)
        name, n_bytes = next(iter(lacks.items()))
        what = f"The model with a context of {setup.n_ctx} tokens" + (f" for each of {self._n_sessions} conversations"
                                                                      if self._n_sessions > 1 else "")
        if not device_of(name).reserved:
            free = fit.rooms[HOST].free
            return OutOfMemoryError(f"{what} would take {size(free + n_bytes)} of memory, but {size(free)} are free, {size(n_bytes)} too "
                                    f"few; {LESS}.")
        share = next(share for share in fit.shares(setup) if share.device == name)
        free = size(fit.rooms[name].free)
        margin = f" and {size(fit.margin)} shall stay so (--fit-margin)" if fit.margin else ""
        return OutOfMemoryError(f"{what} would take {size(share.total)} on {name}, but {free} are free there{margin}, "
                                f"{size(n_bytes)} too few; {self._advice(setup)}.")

    def _advice(self, setup):
        """What would fit instead, in words."""
        gpus = [name for name in setup.placement.devices if device_of(name).reserved and name in self._gpus]
        if gpus:
            fit = self._fit(setup, self._margin)
            free = setup.placing.changed(**ON_THE_HOST | {"devices": tuple(gpus), "override_tensor": ()})
            found = Search(fit, free).run()
            if found is not None:
                return f"{options_in_words(found.placing)} fits"
        return f"--device {HOST} needs no GPU, or {LESS}"

    def _notes(self, setup, shares):
        """Sentences on what the plan means."""
        n_mapped = sum(share.mapped for share in shares)
        free = limits.available().n_bytes if self._given is None else None
        if free is not None and n_mapped > free:
            yield (f"{size(n_mapped)} of weights are read where the file is mapped, more than the {size(free)} of memory that are free: "
                   "what is not in memory comes from the drive.")
        if setup.slot_bytes:
            n = setup.stream_from
            when = "where that takes less time" if n is None else f"from {n} token{'s' * (n != 1)} on"
            yield (f"Prompts copy the experts of the CPU to the GPU {when}, through slots of {size(setup.slot_bytes)} there "
                   "(--stream-from 0: never).")
        elif self._left_out:
            yield no_room_for_slots(self._left_out)

    def longest_context(self):
        """See the function longest_context()."""
        own = self._setup()
        longest, placing = own.config.n_ctx_train, own.placing
        gpus = [name for name in own.placement.devices if device_of(name).reserved]
        fills = bool(self.automatic and gpus)
        margin = self._margin if fills else 0
        if fills:
            moe = {} if placing.cpu_moe or placing.n_cpu_moe else dict(cpu_moe=any(map(is_of_experts, own.weights.used)))
            placing = placing.changed(**moe)
            fit = self._fit(self._setup(n_ctx=longest), margin)
            split = fit.filled(placing, {})[1]
            placing = placing if split is None else placing.changed(tensor_split=split)
        fit = self._fit(own, margin)
        for name in gpus:
            if name not in fit.rooms:
                fit.rooms[name] = Room("", 0, backend_of(name).free_bytes())

        def n_bytes(n_ctx):
            return {share.device: share.total for share in fit.shares(self._setup(n_ctx=n_ctx).placed(placing))}

        def fits(taken):
            return not fit.lacking({name: n if fills and device_of(name).reserved else n * (1 + SPARE) for name, n in taken.items()})
        n_ctx = _longest(n_bytes, fits, max(own.n_ubatch, own.config.top_k or 0), longest)
        if (n_ctx or 0) < min(LEAST, longest) and own.stream_from is None and self._setup(n_ctx=STEP).placed(placing).slot_bytes:
            self._settings = self._settings | {"stream_from": 0}
            return self.longest_context()
        if (n_ctx or 0) < min(LEAST, longest) and fills and placing.n_gpu_layers is None:
            self._device, self._settings = HOST, self._settings | {"tensor_split": None}
            return self.longest_context()
        if n_ctx is None:
            raise self._too_large(fit, self._setup(n_ctx=min(STEP, longest)).placed(placing))
        return n_ctx, n_ctx == longest


def _longest(n_bytes, fits, bend, longest):
    """The longest context that fits, None if there is none.

    It is `longest`, or a multiple of STEP, of which fits(n_bytes(n_ctx)). n_bytes: {device: bytes}, for few contexts, as it takes long; in
    between they are on a line, with a bend: values of whole ubatches and the choice of keys take memory from some length on.
    """
    low, high = min(STEP, longest), longest
    end = n_bytes(high)
    if fits(end):
        return longest
    start = n_bytes(low)
    if not fits(start):
        return None
    bend = STEP * (bend // STEP + 1)
    if low < bend < high:
        middle = n_bytes(bend)
        (low, start), (high, end) = ((bend, middle), (high, end)) if fits(middle) else ((low, start), (bend, middle))
    first, last = 0, (high - low) // STEP + 1       # steps from `low`: as if `first` fitted, and `last` did not
    while last - first > 1:
        middle = (first + last) // 2
        part = middle * STEP / max(1, high - low)
        held = fits({name: start[name] + (end[name] - start[name]) * part for name in start})
        first, last = (middle, last) if held else (first, middle)
    while first > 0 and not fits(n_bytes(low + first * STEP)):
        first = first * 15 // 16        # no line goes through all contexts' bytes
    return low + first * STEP


def n_on_gpus(setup):
    """The number of layers at home on devices with memory of their own."""
    return sum(bool(device_of(name).reserved) for name in setup.placement.layers)


def _by_the_environment():
    """What "auto" stands for: the devices of PYDSA_DEVICE, or itself."""
    device = os.environ.get(DEVICE, "").strip() or AUTO
    return device if _is_auto(device) else check_devices(device, DEVICE)


def _is_auto(device):
    return isinstance(device, str) and device.strip().lower() == AUTO
