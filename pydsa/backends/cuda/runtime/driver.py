"""The CUDA driver API of one GPU: memory, copies, launches, CUDA graphs.

It goes through cuda.bindings. Only Numba's compiler is used, not its runtime. All work of a GPU goes to one stream, in the order of the
calls, whichever host thread makes them.
"""
import ctypes
import functools
import struct
import threading
import weakref

import numpy as np
from cuda.bindings import driver

from pydsa.backends import gpus
from pydsa.errors import LESS, OutOfMemoryError, PydsaError


DEPENDENT_SINCE = 9, 0      # the first capability with launches that depend on others in part
PACKED, PACKED_SIZE, END = 1, 2, 0      # tags in cuLaunchKernel's last argument, `extra` (CU_LAUNCH_PARAM_*)


class Memory:
    """An allocation of a GPU, freed when nothing refers to this object."""

    def __init__(self, gpu, address):
        self.gpu, self.address, self.known = gpu, address, {}       # known: see DeviceArray.greatest
        gpu.frees(self, "cuMemFree", address)


class Pinned:
    """Memory of the host that GPUs copy from and to at full speed.

    It has numpy's array interface, as uint8, and is freed when nothing refers to this object.
    """

    def __init__(self, gpu, address, n_bytes):
        self.__array_interface__ = {"data": (address, False), "shape": (n_bytes,), "typestr": "|u1", "version": 3}
        gpu.frees(self, "cuMemFreeHost", address)


class Registered:
    """Memory of the host from which GPUs copy at full speed.

    This holds as long as the object lives.
    """

    ranges = {}         # of all that there are: address -> number of bytes

    def __init__(self, gpu, array):
        address = array.ctypes.data
        self.ranges[address] = array.nbytes
        weakref.finalize(self, self.ranges.pop, address).atexit = False
        gpu.frees(self, "cuMemHostUnregister", address, array)


class Event:
    """A point in a GPU's stream, that the host or another stream waits for."""

    def __init__(self, gpu, handle):
        self.handle = handle
        gpu.frees(self, "cuEventDestroy", handle)


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


class CopyStream:
    """A second stream of a GPU, for copies while kernels run.

    One thread uses it, that has called settle_in().
    """

    def __init__(self, gpu):
        with gpu:
            self._do, self._stream = gpu._do, gpu._do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def send(self, address, source, n_bytes):
        """Copy from pinned memory to the GPU, without waiting."""
        self._do("cuMemcpyHtoDAsync", address, source, n_bytes, self._stream)

    def clear(self, address, n_bytes):
        """Set bytes to zero."""
        self._do("cuMemsetD8Async", address, 0, n_bytes, self._stream)

    def mark(self, event):
        """Let an event be the point after all that the stream has been given."""
        self._do("cuEventRecord", event.handle, self._stream)

    def follow(self, event):
        """Let what the stream is given from now on wait for an event."""
        self._do("cuStreamWaitEvent", self._stream, event.handle, 0)

    def wait(self, event):
        """Wait on the host until an event is reached."""
        self._do("cuEventSynchronize", event.handle)


class GraphExec:
    """A recorded step: an instantiated CUDA graph."""

    def __init__(self, gpu, graph):
        self.graph = graph
        gpu.frees(self, "cuGraphExecDestroy", graph)


class _Thread(threading.local):
    """What a thread is at: the GPUs that it has locked, and whose context is current."""

    def __init__(self):
        self.locked, self.current = [], None


_thread = _Thread()


class Gpu:
    """A GPU of CUDA_VISIBLE_DEVICES, opened on first use.

    Raises OutOfMemoryError if the driver is out of memory, and PydsaError for any other error of the driver. `title` is how messages call
    it: "The GPU", or with its number where there are several.
    """

    has_bus = True      # whether copies to it can be measured

    def __init__(self, index=0):
        self.index, self.title = index, "The GPU"
        self._lock = threading.RLock()         # one thread's work must not be captured in another's step
        self._recording, self._garbage = False, []      # garbage: (driver function, handle, memory) of what nothing refers to

    def _do(self, name, *args):
        """Call a driver function and check its status.

        Returns what follows the status: a value, a list of several, or None.
        """
        status, *results = getattr(gpus.driver(), name)(*args)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(f"{self.title} has no memory left ({name}); {LESS}.")
        if status:
            where = "" if self.title == "The GPU" else f" on {self.title}"
            raise PydsaError(f"The CUDA driver answers {status.name} to {name}{where}.")
        return results if len(results) > 1 else results[0] if results else None

    @functools.cached_property
    def _device(self):
        if gpus.check_index(self.index) > 1:
            self.title = f"GPU {self.index}"
        return self._do("cuDeviceGet", self.index)

    def check(self):
        """Raise PydsaError if there is no GPU of this index, or no driver."""
        self._device

    @functools.cached_property
    def capability(self):
        """The compute capability, (9, 0) for example."""
        return gpus.capability(self._device)

    @functools.cached_property
    def name(self):
        """The name of the GPU."""
        return gpus.device_name(self._device)

    @functools.cached_property
    def _context(self):
        return self._do("cuDevicePrimaryCtxRetain", self._device)

    @functools.cached_property
    def _stream(self):
        return self._do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def __enter__(self):
        """Lock the GPU for this thread and make its context current."""
        gpus.check_process()
        self._lock.acquire()
        _thread.locked.append(self)     # first, as a finalizer may lock another GPU at any time, and then returns to the last of the list
        try:
            self._make_current()
        except BaseException:
            _thread.locked.pop()
            self._lock.release()
            raise

    def _make_current(self):
        if _thread.current is not self:
            self._do("cuCtxSetCurrent", self._context)
            _thread.current = self

    def __exit__(self, *error):
        _thread.locked.pop()
        try:
            if _thread.locked:
                _thread.locked[-1]._make_current()
        finally:
            self._lock.release()
        if self._garbage and not any(error):
            self._free()

    def settle_in(self):
        """Make the context current for good in this thread, which locks nothing."""
        gpus.check_process()
        self._make_current()
        _thread.locked.append(self)     # where a finalizer returns to, that locks another GPU

    def copy_stream(self):
        """A new CopyStream."""
        return CopyStream(self)

    def frees(self, owner, function, handle, memory=None):
        """Let a driver function free a handle when its owner is gone.

        memory: what must live until then. At exit the driver frees everything. In a fork it is not there.
        """
        weakref.finalize(owner, self._throw_away, function, handle, memory).atexit = False

    def _throw_away(self, function, handle, memory):
        if not gpus.forked():
            self._garbage.append((function, handle, memory))
            self._free()

    def _free(self):
        """Free what is thrown away, except while a step is being recorded.

        Finalizers come here at any time, in any thread, and must not wait for one that waits for a lock of this thread. Whoever has the
        lock frees the rest when it leaves.
        """
        while self._garbage and not self._recording and self._lock.acquire(blocking=False):
            try:
                with self:
                    while self._garbage and not self._recording:
                        function, handle, memory = self._garbage.pop()
                        self._do(function, handle)
            finally:
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
                raise OutOfMemoryError(f"{self.title} has no room for {n_bytes / 2**20:.0f} MiB more; {LESS}.") from error

    def host_empty(self, shape, dtype):
        """A numpy array without values in pinned memory, aligned to pages.

        Raises OutOfMemoryError if the system or the driver refuses it.
        """
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        with self:
            try:
                address = int(self._do("cuMemHostAlloc", max(1, n_bytes), driver.CU_MEMHOSTALLOC_PORTABLE))
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"The system refuses {n_bytes / 2**20:.0f} MiB of pinned memory, which the GPU copies from; "
                                       f"{LESS}.") from error
            memory = Pinned(self, address, n_bytes)
        return np.asarray(memory).view(dtype).reshape(shape)

    def register(self, array):
        """Let GPUs copy from a contiguous array of the host at full speed.

        It holds as long as the object that is returned. The array must be in memory of the process, and share no page with another
        registered one. Raises OutOfMemoryError if the system refuses it.
        """
        with self:
            try:
                self._do("cuMemHostRegister", array.ctypes.data, array.nbytes, driver.CU_MEMHOSTREGISTER_PORTABLE)
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"The system refuses to pin {array.nbytes / 2**20:.0f} MiB of weights in memory, from where the "
                                       f"GPU copies them; leave out --no-mmap.") from error
            return Registered(self, array)

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

    def allow_shared(self, function, n_bytes):
        """Let launches of a kernel have so many bytes of dynamic shared memory."""
        with self:
            self._do("cuFuncSetAttribute", function, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, n_bytes)

    def launch(self, function, grid, n_threads, parameters, values, n_shared=0, dependent=False):
        """Launch a kernel on a grid (x, y, z) of blocks of n_threads threads.

        n_shared: bytes of dynamic shared memory. dependent: it may begin before the launch before it has ended, and waits for that itself;
        GPUs before capability 9.0 cannot do that.
        """
        with self:
            parameters.fill(values)
            if dependent and self.capability >= DEPENDENT_SINCE:
                config = self._dependent(grid, n_threads, n_shared)
                self._do("cuLaunchKernelEx", config, function, 0, parameters.address)
            else:
                self._do("cuLaunchKernel", function, *grid, n_threads, 1, 1, n_shared, self._stream, 0, parameters.address)

    def _dependent(self, grid, n_threads, n_shared):
        """How a dependent kernel is launched: a record of the driver."""
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes = n_threads, 1, 1, n_shared
        config.hStream, config.attrs, config.numAttrs = int(self._stream), [attribute], 1
        return config

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

    def event(self):
        """A new Event, that nothing has reached yet; it has no time."""
        with self:
            return Event(self, self._do("cuEventCreate", driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def mark(self, event):
        """Let an event be the point after all that the GPU has been given."""
        with self:
            self._do("cuEventRecord", event.handle, self._stream)

    def wait(self, event):
        """Wait on the host until an event is reached. Later work may still run."""
        with self:
            self._do("cuEventSynchronize", event.handle)

    def follow(self, event):
        """Let what the GPU is given from now on wait for an event, of any GPU."""
        with self:
            self._do("cuStreamWaitEvent", self._stream, event.handle, 0)

    def send(self, address, source, n_bytes, event):
        """Copy from pinned memory to the GPU, without waiting; mark an event."""
        with self:
            self._do("cuMemcpyHtoDAsync", address, source, n_bytes, self._stream)
            self._do("cuEventRecord", event.handle, self._stream)

    def receive(self, target, address, n_bytes, event):
        """Copy from the GPU to pinned memory, without waiting; mark an event."""
        with self:
            self._do("cuMemcpyDtoHAsync", target, address, n_bytes, self._stream)
            self._do("cuEventRecord", event.handle, self._stream)

    def copy_across(self, target, address, source, n_bytes):
        """Copy bytes to an address of a GPU, this or another one.

        It is in the order of this GPU's work. No access of one to the other's memory is needed.
        """
        with self:
            if target is self:
                self._do("cuMemcpyDtoDAsync", address, source, n_bytes, self._stream)
            else:
                self._do("cuMemcpyPeerAsync", address, target._context, source, self._context, n_bytes, self._stream)
