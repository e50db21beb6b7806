"""A PTX emulator for tests: it runs the CUDA kernels in numpy, without a GPU.

    PYDSA_TEST_DEVICE=ptx python -m pytest tests/test_ops.py

NVVM's output is executed as the PTX ISA specifies, inline assembly included, with the grid and blocks of a GPU. The emulator makes checks
that a GPU does not. It stops with the line of the PTX at accesses that are out of bounds, misaligned or of uninitialized memory, at races,
at barriers and warp-synchronous instructions that some threads do not reach, and where a wait, a fence or a barrier is missing for copies
and products that go on meanwhile. It implements only the instructions that these kernels use. driver.py emulates the driver, so that all of
the backend's Python code runs as it does on a GPU.
"""
