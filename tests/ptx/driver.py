"""Emulated NVIDIA driver for pydsa.backends.cuda.

The memory of each device is an Arena. Kernels are passed as PTX and executed by machine.py. Call install() before the backend is used; it
then calls a Driver instead of cuda.bindings.driver. The Driver returns the driver's status codes and rejects what is not allowed during
stream capture, or with another device's context. With `streams.late` work is done as late as allowed (streams.py).
"""
import ctypes
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
from cuda.bindings.driver import CUdevice_attribute, CUevent_record_flags, CUfunction_attribute, CUlaunchAttributeID, CUresult

from tests.ptx.machine import Kernel
from tests.ptx.memory import Arena
from tests.ptx.program import parse
from tests.ptx.streams import Event, Point, Streams

CAPABILITY = 8, 0
SIZE = 1 << 28
DONE = CUresult.CUDA_SUCCESS
INVALID, UNSUPPORTED = CUresult.CUDA_ERROR_INVALID_VALUE, CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
HANDLE, CONTEXT = CUresult.CUDA_ERROR_INVALID_HANDLE, CUresult.CUDA_ERROR_INVALID_CONTEXT
LETTERS = {"u8": "B", "u32": "I", "u64": "Q", "f32": "f", "f64": "d"}     # PTX type of a parameter -> letter of the module struct
PAGE = 4096
SHARED_OF_BLOCK = {(8, 0): 163 << 10, (9, 0): 227 << 10}        # the most bytes of shared memory that a kernel may ask for, by capability
SMALL_SHARED_OF_BLOCK = 99 << 10                                # and of others
OF_A_CONTEXT = 640 << 20        # bytes that a plan leaves for a GPU's context, and that are not there to allocate
WITHOUT_CONTEXT = ("cuInit", "cuDriverGetVersion", "cuDevice", "cuCtx", "cuEventElapsedTime", "cuGraphInstantiate", "cuGraphDestroy",
                   "cuGraphExecDestroy", "cuEventDestroy")       # beginnings of the names of functions that need no current context


class Driver:
    """The functions of cuda.bindings.driver that the backend calls.

    n: the number of devices. fail: name of a function -> the error that it returns.
    """

    def __init__(self, size=SIZE, n=1):
        self.arenas, self.fail, self.version, self.capability = [Arena(size) for _ in range(n)], {}, 13000, CAPABILITY
        self.capabilities = {}      # device -> its capability, where it is another one
        self.streams = Streams()
        self.capturing = {}         # thread -> the stream that it captures
        self.counts = {}            # how often each function was called
        self.log = []               # (function, device), in the order of the calls
        self.pinned = {}            # address -> number of bytes that copies may access at any time
        self.retained = [0] * n     # how often the context of each device was retained
        self._hosts, self._here, self._lock = {}, threading.local(), threading.RLock()

    def __getattribute__(self, name):
        function = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return function

        def call(*args):
            with self._lock:
                self.counts[name] = self.counts.get(name, 0) + 1
                self.log.append((name, self.device))
                if name in self.fail:
                    return self.fail[name],
                if not name.startswith(WITHOUT_CONTEXT) and self.device is None:
                    return CONTEXT,
                return function(*args)
        return call

    @property
    def device(self):
        """The device whose context is current in this thread, or None."""
        return getattr(self._here, "device", None)

    @property
    def arena(self):
        """The memory of the current device, or of the first."""
        return self.arenas[self.device or 0]

    @property
    def recording(self):
        """What a thread captures just now, or None."""
        return next((stream.recording for stream in self.capturing.values()), None)

    @property
    def _captures(self):
        return threading.get_ident() in self.capturing

    def cuInit(self, flags):
        return DONE,

    def cuDriverGetVersion(self):
        return DONE, self.version

    def cuDeviceGetCount(self):
        return DONE, len(self.arenas)

    def cuDeviceGet(self, i):
        return (DONE, i) if i < len(self.arenas) else (CUresult.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDeviceGetName(self, n, device):
        return DONE, b"PTX in numpy (tests/ptx)".ljust(n, b"\0")

    def cuDeviceGetUuid(self, device):
        return DONE, SimpleNamespace(bytes=bytes([device] * 16))

    def cuDeviceTotalMem(self, device):
        return DONE, self.arenas[device].size + OF_A_CONTEXT

    def cuDeviceGetAttribute(self, kind, device):
        capability = self.capabilities.get(device, self.capability)
        return DONE, capability[kind != CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR]

    def cuDevicePrimaryCtxRetain(self, device):
        self.retained[device] += 1
        return DONE, ("context", device)

    def cuDevicePrimaryCtxRelease(self, device):
        self.retained[device] -= 1
        return DONE,

    def cuCtxSetCurrent(self, context):
        self._here.device = context[1]
        return DONE,

    def cuCtxPushCurrent(self, context):
        self._here.before, self._here.device = self.device, context[1]
        return DONE,

    def cuCtxPopCurrent(self):
        device, self._here.device = self.device, self._here.before
        return DONE, ("context", device)

    def cuStreamCreate(self, flags):
        return DONE, self.streams.new(self.device)

    def cuMemGetInfo(self):
        n_bytes = self.arena.size + OF_A_CONTEXT
        return DONE, n_bytes, n_bytes

    def cuMemAlloc(self, n_bytes):
        if self._captures:
            return UNSUPPORTED, 0
        try:
            return DONE, self.arena.base + self.arena.allocate(n_bytes)
        except MemoryError:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0

    def cuMemFree(self, address):
        if self._captures:
            return UNSUPPORTED,
        self.streams.finish_all()
        self.arena.free(address - self.arena.base)
        return DONE,

    def cuMemHostAlloc(self, n_bytes, flags):
        if self._captures:
            return UNSUPPORTED, 0
        memory = np.full(n_bytes + PAGE, 0xAB, np.uint8)
        address = -(-memory.ctypes.data // PAGE) * PAGE
        self._hosts[address], self.pinned[address] = memory, n_bytes
        return DONE, address

    def cuMemFreeHost(self, address):
        self.streams.finish_all()
        del self._hosts[address], self.pinned[address]
        return DONE,

    def cuMemHostRegister(self, address, n_bytes, flags):
        if address in self.pinned:
            return CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
        self.pinned[address] = n_bytes
        return DONE,

    def cuMemHostUnregister(self, address):
        self.streams.finish_all()
        there = self.pinned.pop(address, None) is not None
        return (DONE if there else CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED),

    def _is_pinned(self, address, n_bytes):
        return any(start <= address and address + n_bytes <= start + n for start, n in self.pinned.items())

    def _place(self, address, n_bytes, device=None):
        """The slice of a device's arena with these bytes.

        None if not all of them are allocated.
        """
        arena = self.arena if device is None else self.arenas[device]
        place = slice(address - arena.base, address - arena.base + n_bytes)
        return place if 0 <= place.start and place.stop <= arena.size and arena.allowed[place].all() else None

    def _enqueue(self, stream, place, work):
        """Enqueue work on memory of the current device, if it is allowed."""
        if place is None or stream.device != self.device or stream.recording is not None:
            return INVALID,
        self.streams.push(stream, work)
        return DONE,

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        place, arena = self._place(target, n_bytes), self.arena
        staged = None if self._is_pinned(source, n_bytes) else ctypes.string_at(source, n_bytes)

        def copy():
            ctypes.memmove(target, source if staged is None else staged, n_bytes)
            arena.initialized[place] = True
        return self._enqueue(stream, place, copy)

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        result = self._enqueue(stream, self._place(source, n_bytes), lambda: ctypes.memmove(target, source, n_bytes))
        if result == (DONE,) and not self._is_pinned(target, n_bytes):
            self.streams.finish(stream)
        return result

    def cuMemcpyDtoDAsync(self, target, source, n_bytes, stream):
        return self._copy_across(target, self.device, source, self.device, n_bytes, stream)

    def cuMemcpyPeerAsync(self, target, there, source, here, n_bytes, stream):
        return self._copy_across(target, there[1], source, here[1], n_bytes, stream)

    def _copy_across(self, target, there, source, here, n_bytes, stream):
        place, place_there = self._place(source, n_bytes, here), self._place(target, n_bytes, there)
        if place_there is None:
            return INVALID,

        def copy():
            ctypes.memmove(target, source, n_bytes)
            self.arenas[there].initialized[place_there] = self.arenas[here].initialized[place]
        return self._enqueue(stream, place, copy)

    def cuMemsetD8Async(self, address, value, n_bytes, stream):
        place, arena = self._place(address, n_bytes), self.arena

        def work():
            arena.data[place], arena.initialized[place] = value, True
        return self._enqueue(stream, place, work)

    def cuStreamSynchronize(self, stream):
        if stream.recording is not None:
            return UNSUPPORTED,
        self.streams.finish(stream)
        return DONE,

    def cuStreamWaitEvent(self, stream, event, flags):
        if stream.device != self.device or stream.recording is not None:
            return HANDLE,
        if event.point is not None:
            self.streams.push(stream, event.point)
        return DONE,

    def cuModuleLoadData(self, image):
        kernel = Kernel(parse(image.decode()), self.arena)
        return DONE, kernel

    def cuModuleGetFunction(self, module, name):
        return (DONE, module) if name.decode() == module.program.name else (CUresult.CUDA_ERROR_NOT_FOUND, None)

    def cuLaunchKernel(self, kernel, x, y, z, n_threads, one, other, n_shared, stream, pointers, packed):
        assert (one, other, pointers) == (1, 1, 0)
        return self._launch(stream, kernel, (x, y, z), n_threads, self._values(kernel, packed), n_shared, False)

    def cuLaunchKernelEx(self, config, kernel, pointers, packed):
        stream = next((stream for stream in self.streams.all if int(stream) == int(config.hStream)), None)
        if stream is None or self.arena_capability(kernel.arena) < (9, 0):
            return HANDLE if stream is None else CUresult.CUDA_ERROR_NOT_SUPPORTED,
        attributes = {attribute.id: attribute.value for attribute in config.attrs}
        assert set(attributes) <= {CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION} and pointers == 0
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        assert (config.blockDimY, config.blockDimZ, len(config.attrs)) == (1, 1, config.numAttrs)
        dependent = any(value.programmaticStreamSerializationAllowed for value in attributes.values())
        return self._launch(stream, kernel, grid, config.blockDimX, self._values(kernel, packed), config.sharedMemBytes, dependent)

    def arena_capability(self, arena):
        """The capability of the device that has a memory."""
        return self.capabilities.get(self.arenas.index(arena), self.capability)

    def _launch(self, stream, kernel, grid, n_threads, values, n_shared, dependent):
        x, y, z = grid
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16 and 0 < n_threads <= 1024):
            return INVALID,
        if stream.device != self.device or kernel.arena is not self.arena:
            return HANDLE,
        if kernel.sizes["shared"] + n_shared > kernel.most_shared:
            return INVALID,
        step = kernel, grid, n_threads, values, n_shared
        if stream.recording is None:
            dependent = dependent and stream.ends_with_kernel
            self.streams.push(stream, lambda: kernel.launch(*step[1:], dependent))
            stream.ends_with_kernel = True
        else:
            dependent = dependent and bool(stream.recording) and len(stream.recording[-1]) > 1
            stream.recording.append((*step, dependent))
        return DONE,

    def cuFuncSetAttribute(self, kernel, attribute, value):
        assert attribute == CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        most = SHARED_OF_BLOCK.get(self.arena_capability(kernel.arena), SMALL_SHARED_OF_BLOCK)
        if kernel.sizes["shared"] + value > most:
            return INVALID,
        kernel.most_shared = kernel.sizes["shared"] + value
        return DONE,

    def _values(self, kernel, packed):
        """The parameters' bits or values, from a buffer laid out as a C struct."""
        begin, start, size_of, size, end = (ctypes.c_void_p * 5).from_address(packed)
        kinds = "".join(LETTERS[kind] for kind in kernel.program.parameters.values())
        n_bytes = ctypes.c_size_t.from_address(size).value
        assert (begin, size_of, end) == (1, 2, None) and n_bytes == struct.calcsize(kinds), kernel.program.name
        return struct.unpack(kinds, ctypes.string_at(start, n_bytes))

    def cuStreamBeginCapture(self, stream, mode):
        assert stream.recording is None and not self._captures
        stream.recording, self.capturing[threading.get_ident()] = [], stream
        return DONE,

    def cuStreamEndCapture(self, stream):
        graph, stream.recording = stream.recording, None
        del self.capturing[threading.get_ident()]
        return DONE, graph

    def cuEventCreate(self, flags):
        return DONE, Event(self.device)

    def cuEventRecord(self, event, stream):
        if event.device != stream.device or stream.recording is not None:
            return HANDLE,
        self.streams.push(stream, lambda: None)
        event.point = Point(stream)
        return DONE,

    def cuEventRecordWithFlags(self, event, stream, flags):
        if stream.recording is None or flags != CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL:
            return INVALID,
        stream.recording.append((event,))
        return DONE,

    def cuEventSynchronize(self, event):
        if event.point is not None:
            self.streams.finish(event.point.stream, event.point.n)
        return DONE,

    def cuEventElapsedTime(self, first, last):
        return DONE, 1000 * (last.time - first.time)

    def cuEventDestroy(self, event):
        return DONE,

    def cuGraphInstantiate(self, graph, flags):
        return DONE, list(graph)

    def cuGraphDestroy(self, graph):
        return DONE,

    def cuGraphLaunch(self, graph, stream):
        if stream.device != self.device:
            return HANDLE,

        def launch():
            for what, *step in graph:
                if step:
                    what.launch(*step)
                else:
                    what.time = time.perf_counter()     # an event
        self.streams.push(stream, launch)
        return DONE,

    def cuGraphExecDestroy(self, graph):
        self.streams.finish_all()
        graph.clear()
        return DONE,


def install(size=SIZE, n=1):
    """Run the CUDA backend on the emulator, with n devices. Returns its Driver."""
    from pydsa.backends import gpus
    from pydsa.backends.cuda.runtime.launch import Kernel
    gpus.api = Driver(size, n)
    Kernel.cubin = lambda kernel, capability: kernel.ptx(capability).encode()       # the real driver accepts PTX too
    return gpus.api
