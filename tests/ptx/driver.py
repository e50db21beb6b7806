"""Emulated NVIDIA driver for pydsa.backends.cuda.

Device memory is an Arena. Kernels are passed as PTX and executed by machine.py. Call install() before the backend is used; it then calls a
Driver instead of cuda.bindings.driver. The Driver returns the driver's status codes and rejects what is not allowed during stream capture.
"""
import ctypes
import struct
import time

from cuda.bindings.driver import CUdevice_attribute, CUevent_record_flags, CUresult

from tests.ptx.machine import Kernel
from tests.ptx.memory import Arena
from tests.ptx.program import parse

CAPABILITY = 8, 0
SIZE = 1 << 28
DONE = CUresult.CUDA_SUCCESS
LETTERS = {"u8": "B", "u32": "I", "u64": "Q", "f32": "f", "f64": "d"}     # PTX type of a parameter -> letter of the module struct


class Driver:
    """The functions of cuda.bindings.driver that the backend calls.

    fail: name of a function -> the error that it returns.
    """

    def __init__(self, size=SIZE):
        self.arena, self.fail, self.version, self.capability = Arena(size), {}, 13000, CAPABILITY
        self.recording = None       # launches of the graph that is being captured
        self.counts = {}            # how often each function was called

    def __getattribute__(self, name):
        function = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return function
        self.counts[name] = self.counts.get(name, 0) + 1
        return (lambda *args: (self.fail[name],)) if name in self.fail else function

    def cuInit(self, flags):
        return DONE,

    def cuDriverGetVersion(self):
        return DONE, self.version

    def cuDeviceGet(self, i):
        return DONE, i

    def cuDeviceGetName(self, n, device):
        return DONE, b"PTX in numpy (tests/ptx)".ljust(n, b"\0")

    def cuDeviceGetAttribute(self, kind, device):
        return DONE, self.capability[kind != CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR]

    def cuDevicePrimaryCtxRetain(self, device):
        return DONE, "context"

    def cuCtxSetCurrent(self, context):
        return DONE,

    def cuStreamCreate(self, flags):
        return DONE, "stream"

    def cuMemGetInfo(self):
        return DONE, self.arena.size, self.arena.size

    def cuMemAlloc(self, n_bytes):
        if self.recording is not None:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0
        try:
            return DONE, self.arena.base + self.arena.allocate(n_bytes)
        except MemoryError:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0

    def cuMemFree(self, address):
        if self.recording is not None:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        self.arena.free(address - self.arena.base)
        return DONE,

    def _place(self, address, n_bytes):
        """The slice of the arena with these bytes.

        None if not all of them are allocated, or during stream capture.
        """
        place = slice(address - self.arena.base, address - self.arena.base + n_bytes)
        valid = self.recording is None and 0 <= place.start and place.stop <= self.arena.size and self.arena.allowed[place].all()
        return place if valid else None

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        place = self._place(target, n_bytes)
        if stream != "stream" or place is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE,
        ctypes.memmove(target, source, n_bytes)
        self.arena.initialized[place] = True
        return DONE,

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        if stream != "stream" or self._place(source, n_bytes) is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE,
        ctypes.memmove(target, source, n_bytes)
        return DONE,

    def cuMemsetD8Async(self, address, value, n_bytes, stream):
        place = self._place(address, n_bytes)
        if stream != "stream" or place is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE,
        self.arena.data[place], self.arena.initialized[place] = value, True
        return DONE,

    def cuStreamSynchronize(self, stream):
        return DONE if self.recording is None else CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,

    def cuModuleLoadData(self, image):
        return DONE, Kernel(parse(image.decode()), self.arena)

    def cuModuleGetFunction(self, module, name):
        return (DONE, module) if name.decode() == module.program.name else (CUresult.CUDA_ERROR_NOT_FOUND, None)

    def cuLaunchKernel(self, kernel, x, y, z, n_threads, one, other, n_shared, stream, pointers, packed):
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16 and 0 < n_threads <= 1024):
            return CUresult.CUDA_ERROR_INVALID_VALUE,
        assert (one, other, n_shared, stream, pointers) == (1, 1, 0, "stream", 0)
        step = kernel, (x, y, z), n_threads, self._values(kernel, packed)
        if self.recording is None:
            kernel.launch(*step[1:])
        else:
            self.recording.append(step)
        return DONE,

    def _values(self, kernel, packed):
        """The parameters' bits or values, from a buffer laid out as a C struct."""
        begin, start, size_of, size, end = (ctypes.c_void_p * 5).from_address(packed)
        kinds = "".join(LETTERS[kind] for kind in kernel.program.parameters.values())
        n_bytes = ctypes.c_size_t.from_address(size).value
        assert (begin, size_of, end) == (1, 2, None) and n_bytes == struct.calcsize(kinds), kernel.program.name
        return struct.unpack(kinds, ctypes.string_at(start, n_bytes))

    def cuStreamBeginCapture(self, stream, mode):
        assert self.recording is None
        self.recording = []
        return DONE,

    def cuStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return DONE, graph

    def cuEventCreate(self, flags):
        return DONE, [None]

    def cuEventRecordWithFlags(self, event, stream, flags):
        if self.recording is None or flags != CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL:
            return CUresult.CUDA_ERROR_INVALID_VALUE,
        self.recording.append((event,))
        return DONE,

    def cuEventElapsedTime(self, first, last):
        return DONE, 1000 * (last[0] - first[0])

    def cuEventDestroy(self, event):
        return DONE,

    def cuGraphInstantiate(self, graph, flags):
        return DONE, list(graph)

    def cuGraphDestroy(self, graph):
        return DONE,

    def cuGraphLaunch(self, graph, stream):
        for what, *step in graph:
            if step:
                what.launch(*step)
            else:
                what[0] = time.perf_counter()       # an event
        return DONE,

    def cuGraphExecDestroy(self, graph):
        graph.clear()
        return DONE,


def install(size=SIZE):
    """Run the CUDA backend on the emulator. Returns its Driver."""
    from pydsa.backends.cuda.array import gpu
    from pydsa.backends.cuda.launch import Kernel
    gpu.api = Driver(size)
    Kernel.cubin = lambda kernel, capability: kernel.ptx(capability).encode()       # the real driver accepts PTX too
    return gpu.api
