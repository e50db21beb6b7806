"""Compile and link CUDA kernels without a GPU, and report registers.

    python tools/cuda_ptx.py
    python tools/cuda_ptx.py --cc 80 --cc 120 --only 'gemm_.*'
    python tools/cuda_ptx.py --cc 90 --loops gemv_q4_k

Each kernel takes the route that it takes on a GPU of that capability: nvJitLink assembles its PTX, or compiles its LTO-IR, for GPUs before
9.0 and where it is for one capability only (then it is left out elsewhere). What nvJitLink says of it is printed. The exit code is 1 if a
kernel does not compile, spills registers, keeps an array in local memory, or has products of wgmma that wait for each other.

NVVM makes the same PTX for all capabilities but for the target and names, so PTX is made for 8.0 only; dependent launches have instructions
of their own from 9.0 on, so that such kernels are compiled twice. All kernels take minutes.

--loops shows the machine instructions of each loop of a kernel, of which a multiprocessor issues four in a cycle. It needs nvdisasm (`pip
install nvidia-cuda-nvdisasm`).
"""
import argparse
import collections
import contextlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pydsa.backends.cuda  # noqa: F401  (fills KERNELS)
from pydsa.backends.cuda.runtime.driver import DEPENDENT_SINCE
from pydsa.backends.cuda.runtime.launch import KERNELS
from pydsa.machine.cores import physical_cores

CAPABILITIES = 80, 86, 89, 90, 120
FIRST = 8, 0                # for which PTX is made
LOCAL = {"rope_angles"}     # the slow path of float64 sines for huge angles has a small table


class Use(NamedTuple):
    """What a kernel uses: registers of a thread, the rest in bytes.

    serialized: whether products of wgmma wait for each other.
    """
    registers: int
    spills: int
    stack: int
    shared: int
    serialized: bool

    def is_too_much(self, name):
        return bool(self.spills or self.stack and name not in LOCAL or self.serialized)


def linked(kernel, target):
    """A kernel's machine code for a capability, and what it uses."""
    code, said = kernel.linked(DEPENDENT_SINCE if kernel.dependent and target >= DEPENDENT_SINCE else kernel.specific or FIRST, target,
                               "-verbose")
    registers, spills, loads, stack, shared = (
        max(map(int, re.findall(pattern, said)), default=0)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"(\d+) bytes stack frame",
                        r"(\d+) bytes smem"))
    assert registers, f"nvJitLink does not tell what {kernel.__name__} uses: {said}"
    return code, Use(registers, spills + loads, stack, shared + kernel.shared, "serialized" in said)


def loops(disassembly):
    """The loops of nvdisasm's output, [(first, last, instructions)].

    A loop is what a backward branch repeats, inner loops included.
    """
    code, labels = [], {}
    for line in disassembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append(re.sub(r"^@\S+\s+", "", instruction[1]))
    ends = [(labels.get(branch[1], len(code)), i) for i, text in enumerate(code) for branch in re.finditer(r"^BRA.*`\((\S+)\)", text)]
    return [(start, end, code[start:end + 1]) for start, end in sorted(ends) if start <= end]


def show_loops(kernel, target):
    """Print the number of instructions of each kind in a kernel's loops."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    nvdisasm = next(filter(None, [*map(str, sorted(wheels.glob("cu*/bin/nvdisasm*"))), shutil.which("nvdisasm")]), None)
    if not nvdisasm:
        sys.exit("--loops needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(linked(kernel, target)[0])
        text = subprocess.run([nvdisasm, "-c", str(path)], check=True, capture_output=True, text=True).stdout
    for start, end, code in loops(text):
        kinds = collections.Counter(instruction.split()[0].split(".")[0] for instruction in code)
        print(f"{start:6}-{end}: {len(code)} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common(12))})")


def uses(name, targets):
    """[(target, Use)] of a kernel, of those that it is for."""
    kernel = KERNELS[name]
    return [(target, linked(kernel, target)[1]) for target in targets if kernel.specific in (None, target)]


def report(targets, pattern=".*", processes=None):
    """Print what kernels use -> the lines of those that use too much.

    pattern: a regular expression that names of kernels match.
    """
    names, bad = [name for name in KERNELS if re.fullmatch(pattern, name)], []
    print(f"{'kernel':28} route {'for':>6} registers  spills   stack  shared")
    processes = processes or physical_cores()
    with contextlib.nullcontext() if processes == 1 else ProcessPoolExecutor(processes) as pool:
        for name, found in zip(names, (pool.map if pool else map)(uses, names, [targets] * len(names))):
            for (major, minor), use in found:
                route = "LTO" if KERNELS[name].takes_lto((major, minor)) else "PTX"
                line = (f"{name:28} {route:5} {f'sm_{major}{minor}':>6} {use.registers:9} {use.spills:7} {use.stack:7} {use.shared:7}"
                        f"{' serialized' if use.serialized else ''}")
                print(line, flush=True)
                bad += [line] if use.is_too_much(name) else []
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", type=int, action="append", help=f"compute capability [{', '.join(map(str, CAPABILITIES))}]")
    parser.add_argument("--only", metavar="REGEX", default=".*", help="kernels whose names match as a whole")
    parser.add_argument("--loops", metavar="KERNEL", help="show the instructions of its loops")
    options = parser.parse_args()
    targets = [divmod(cc, 10) for cc in options.cc or CAPABILITIES]
    if options.loops:
        if options.loops not in KERNELS:
            sys.exit(f"there is no kernel {options.loops}; there are {', '.join(sorted(KERNELS))}")
        show_loops(KERNELS[options.loops], targets[0])
        return
    bad = report(targets, options.only)
    if bad:
        sys.exit("\n".join(["spills, arrays in local memory, or serialized products:", *bad]))


if __name__ == "__main__":
    main()
