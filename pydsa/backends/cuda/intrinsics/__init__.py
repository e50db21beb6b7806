"""What all kernels call on the GPU: instructions, shared memory, sums."""
