"""Steps of one token: ops that are fused, and kernels of one row."""
