"""Vector registers in kernels: instructions, lanes, tiles of AMX, and lookups."""
