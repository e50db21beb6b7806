"""Compile every CUDA kernel without a GPU, and let ptxas say what registers and memory each takes.

    python tools/cuda_ptx.py --cc 90

Exit code 1 if a kernel does not compile, spills registers, or keeps an array in local memory that should be in registers. A kernel of which
two blocks must fit into a processor may spill a few numbers that its loops do not change. Without ptxas
(it comes with the CUDA toolkit, or `pip install nvidia-cuda-nvcc`) kernels are only compiled to PTX, the GPU's portable assembly.
"""
import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace

LOCAL = {"rope_angles"}     # the slow path of float64 sines for huge angles has a small table
FEW = 64                    # bytes


def find_ptxas():
    """The path of ptxas, or None."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [*map(str, sorted(wheels.glob("cu*/bin/ptxas*"))), shutil.which("ptxas")]     # that of the same version as NVVM first
    return next(filter(None, found), None)


def kernels(capability):
    """All kernels of the backend, made to compile their device functions for a compute capability without asking a GPU for its own."""
    import numba.cuda.dispatcher
    numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    import pydsa.backends.cuda  # noqa: F401  (fills the table)
    from pydsa.backends.cuda.launch import KERNELS
    return KERNELS


def assemble(ptxas, ptx, capability):
    """{"registers", "spills", "stack", "shared"} of a kernel's PTX; bytes but for the first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run([ptxas, f"-arch=sm_{capability[0]}{capability[1]}", "-v", str(path), "-o", str(path.with_suffix(".cubin"))],
                              capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)

    def number(pattern):
        return max(map(int, re.findall(pattern, done.stderr)), default=0)
    return {"registers": number(r"Used (\d+) registers"), "spills": number(r"(\d+) bytes spill stores"),
            "stack": number(r"(\d+) bytes stack frame"), "shared": number(r"(\d+) bytes smem")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", type=int, default=90, help="compute capability, e.g. 80 or 90")
    capability = divmod(parser.parse_args().cc, 10)
    ptxas, bad = find_ptxas(), []
    print(f"{'kernel':24} registers  spills   stack  shared" if ptxas else "ptxas was not found: kernels are compiled to PTX only")
    for name, kernel in kernels(capability).items():
        ptx = kernel.ptx(capability)
        if not ptxas:
            print(name)
            continue
        use = assemble(ptxas, ptx, capability)
        print(f"{name:24} {use['registers']:9} {use['spills']:7} {use['stack']:7} {use['shared']:7}")
        allowed = FEW if kernel.bounds[1] > 1 else 0
        if use["spills"] > allowed or use["stack"] > allowed and name not in LOCAL:
            bad.append(name)
    if bad:
        sys.exit(f"spills or arrays in local memory: {', '.join(bad)}")


if __name__ == "__main__":
    main()
