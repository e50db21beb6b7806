"""A GPU's stand-in for tests: the PTX of CUDA kernels, read and executed in numpy, with checks that a GPU does not make.

    PYDSA_TEST_DEVICE=ptx python -m pytest tests/test_ops.py

What NVVM compiled is executed as the PTX ISA describes it, instructions in inline assembly included, with the blocks and threads that a GPU
would have. It stops, with the line of the PTX, at accesses outside of what was allocated, or not aligned, or of what was never written; at
races; at barriers and common instructions of warps that some threads do not reach. It knows the instructions that these kernels have.
The driver has a stand-in too (driver.py), so that all of the backend's Python runs as it does with a GPU.
"""
