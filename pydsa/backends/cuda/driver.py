"""The CUDA driver API of one GPU: memory, copies, launches, CUDA graphs.

It goes through cuda.bindings. Only Numba's compiler is used, not its runtime. All work goes to one stream, in the order of the calls,
whichever host thread makes them.
"""
import ctypes
import functools
import os
import struct
import threading
import weakref

from cuda import bindings
from cuda.bindings import driver

from pydsa.errors import LESS, OutOfMemoryError, PydsaError


PACKED, PACKED_SIZE, END = 1, 2, 0      # tags in cuLaunchKernel's last argument, `extra` (CU_LAUNCH_PARAM_*)


class Memory:
    """A device allocation, freed when nothing refers to this object."""

    def __init__(self, gpu, address):
        self.address = address
        weakref.finalize(self, gpu.free, address).atexit = False      # at exit the driver frees everything


class Parameters:
    """A kernel's parameters in one buffer, laid out as a C struct.

    kinds: a letter of the module `struct` for each parameter.
    """

    def __init__(self, kinds):
        self._packed = struct.Struct(kinds)
        self._bytes, self._size = ctypes.create_string_buffer(self._packed.size), ctypes.c_size_t(self._packed.size)
        self._extra = (ctypes.c_void_p * 5)(PACKED, ctypes.addressof(self._bytes), PACKED_SIZE, ctypes.addressof(self._size), END)
        self.address = ctypes.addressof(self._extra)

    def fill(self, values):
        """Write the values of all parameters."""
        self._packed.pack_into(self._bytes, 0, *values)


class GraphExec:
    """A recorded step: an instantiated CUDA graph."""

    def __init__(self, gpu, graph):
        self.graph = graph
        weakref.finalize(self, gpu.forget, graph).atexit = False


class Gpu:
    """The first GPU in CUDA_VISIBLE_DEVICES, opened on first use.

    Raises OutOfMemoryError if the driver is out of memory, and PydsaError for any other error of the driver.
    """

    def __init__(self):
        self.api = driver
        self._lock = threading.RLock()         # one thread's work must not be captured in another's step
        self._thread = threading.local()        # .context: whether the context is current in this thread
        self._recording, self._to_free = False, []
        self._process = None        # the id of the process that has the context; a fork of it has none

    def _do(self, name, *args):
        """Call a driver function and check its status.

        Returns what follows the status: a value, a list of several, or None.
        """
        status, *results = getattr(self.api, name)(*args)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"The GPU has no memory left ({name}); {LESS}.")
        if status:
            raise PydsaError(f"The CUDA driver answers {status.name} to {name}.")
        return results if len(results) > 1 else results[0] if results else None

    @functools.cached_property
    def _device(self):
        try:
            self._do("cuInit", 0)
            device = self._do("cuDeviceGet", 0)
        except Exception as error:      # without a driver cuda.bindings raises its own exceptions
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise PydsaError(f"--device cuda finds no NVIDIA driver or no GPU ({first}); `nvidia-smi` must list one.") from error
        made_for, version = int(bindings.__version__.split(".")[0]), self._do("cuDriverGetVersion")
        if version // 1000 < made_for:
            raise PydsaError(f"--device cuda: the NVIDIA driver knows CUDA {version // 1000}.{version % 1000 // 10}, but the installed "
                             f"packages make kernels for CUDA {made_for}; pydsa needs a newer driver, or `pip install "
                             f"'numba-cuda[cu{version // 1000}]'`.")
        return device

    @functools.cached_property
    def capability(self):
        """The compute capability, (9, 0) for example."""
        kinds = driver.CUdevice_attribute
        return tuple(self._do("cuDeviceGetAttribute", kind, self._device) for kind in
                     (kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))

    @functools.cached_property
    def name(self):
        """The name of the GPU."""
        return self._do("cuDeviceGetName", 100, self._device).split(b"\0")[0].decode()

    @functools.cached_property
    def _context(self):
        self._process = os.getpid()
        return self._do("cuDevicePrimaryCtxRetain", self._device)

    @functools.cached_property
    def _stream(self):
        return self._do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def __enter__(self):
        """Lock the GPU for this thread and make its context current."""
        if self._forked():
            raise PydsaError("This process was forked from one that had loaded a model on the GPU already, and cannot use it: load the "
                             "model after the fork, or start the process anew (multiprocessing's \"spawn\").")
        self._lock.acquire()
        try:
            if not getattr(self._thread, "context", False):
                self._do("cuCtxSetCurrent", self._context)
                self._thread.context = True
        except BaseException:
            self._lock.release()
            raise

    def _forked(self):
        return self._process not in (None, os.getpid())

    def __exit__(self, *error):
        self._lock.release()

    def memory(self):
        """Free and total bytes of memory."""
        with self:
            return self._do("cuMemGetInfo")

    def allocate(self, n_bytes):
        """Allocate n_bytes, at least one."""
        with self:
            try:
                return Memory(self, int(self._do("cuMemAlloc", n_bytes)))
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"The GPU has no room for {n_bytes / 2**20:.0f} MiB more; {LESS}.") from error

    def free(self, address):
        """Free memory. Deferred while a step is being recorded; in a fork it is not there."""
        if self._forked():
            return
        with self:
            self._to_free.append(address)
            self._free_deferred()

    def _free_deferred(self):
        while self._to_free and not self._recording:
            self._do("cuMemFree", self._to_free.pop())

    def copy_in(self, address, values):
        """Copy a contiguous numpy array to the GPU."""
        with self:
            self._do("cuMemcpyHtoDAsync", address, values.ctypes.data, values.nbytes, self._stream)
            self._do("cuStreamSynchronize", self._stream)       # the caller may free the values before the copy starts

    def copy_out(self, values, address):
        """Copy from the GPU into a contiguous numpy array. Waits for all earlier launches."""
        with self:
            self._do("cuMemcpyDtoHAsync", values.ctypes.data, address, values.nbytes, self._stream)
            self._do("cuStreamSynchronize", self._stream)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        with self:
            self._do("cuMemsetD8Async", address, 0, n_bytes, self._stream)

    def synchronize(self):
        """Wait for all launches to finish."""
        with self:
            self._do("cuStreamSynchronize", self._stream)

    def load(self, image, name):
        """Load a module and return its kernel, for launch()."""
        with self:
            module = self._do("cuModuleLoadData", image)
            return self._do("cuModuleGetFunction", module, name.encode())

    def launch(self, function, grid, n_threads, parameters, values):
        """Launch a kernel on a grid (x, y, z) of blocks of n_threads threads."""
        with self:
            parameters.fill(values)
            self._do("cuLaunchKernel", function, *grid, n_threads, 1, 1, 0, self._stream, 0, parameters.address)

    def record(self, work):
        """Capture the launches of work() as a GraphExec, without running them."""
        with self:
            self._do("cuStreamBeginCapture", self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            self._recording = True
            try:
                work()
            finally:
                self._recording = False
                graph = self._do("cuStreamEndCapture", self._stream)
            self._free_deferred()
            step = GraphExec(self, self._do("cuGraphInstantiate", graph, 0))
            self._do("cuGraphDestroy", graph)
            return step

    def time_each(self, works):
        """Seconds of each of several functions that launch kernels.

        All are captured in one CUDA graph with an event after each. The graph is launched once.
        """
        with self:
            events = [self._do("cuEventCreate", 0) for _ in range(len(works) + 1)]

            def work():
                for event, work in zip(events, [lambda: None, *works], strict=True):
                    work()
                    self._do("cuEventRecordWithFlags", event, self._stream, driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
            try:
                self.replay(self.record(work))
                self.synchronize()
                return [self._do("cuEventElapsedTime", *pair) / 1000 for pair in zip(events, events[1:])]
            finally:
                for event in events:
                    self._do("cuEventDestroy", event)

    def replay(self, step):
        """Launch a recorded step."""
        with self:
            self._do("cuGraphLaunch", step.graph, self._stream)

    def forget(self, graph):
        """Destroy a GraphExec's graph."""
        if self._forked():
            return
        with self:
            self._do("cuGraphExecDestroy", graph)
