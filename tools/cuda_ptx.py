"""Compile every CUDA kernel without a GPU, and report its registers.

    python tools/cuda_ptx.py --cc 90
    python tools/cuda_ptx.py --cc 80 --assemble 90
    python tools/cuda_ptx.py --cc 90 --loops gemv_q4_k
    python tools/cuda_ptx.py --cc 90 --only 'wgmma_(q4_k|q8_0)'

ptxas reports what a kernel uses. The exit code is 1 if a kernel does not compile, spills registers, or keeps an array in
local memory that should be in registers. A kernel of which two blocks must fit into a multiprocessor may spill a few numbers that its loops
do not change.

--assemble assembles the PTX of --cc for a newer GPU too, which takes a fifth of the time of another --cc. NVVM makes the same PTX for both,
but for the target and names. Kernels that are for one capability only are compiled for that one, and left out elsewhere; dependent launches
have instructions of their own from 9.0 on, so that such kernels are compiled again.

--loops shows the machine instructions of each loop of a kernel, of which a multiprocessor issues four in a cycle. It needs nvdisasm (`pip
install nvidia-cuda-nvdisasm`). Without ptxas (it comes with the CUDA toolkit, or `pip install nvidia-cuda-nvcc`) kernels are only compiled
to PTX, the GPU's portable assembly.
"""
import argparse
import collections
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pydsa.backends.cuda  # noqa: F401  (fills KERNELS)
from pydsa.backends.cuda.launch import KERNELS

LOCAL = {"rope_angles"}     # the slow path of float64 sines for huge angles has a small table
MAX_SPILLS = 64             # bytes, for kernels of which two blocks must fit into a multiprocessor


def find(program):
    """The path of a program of the CUDA toolkit, or None."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [*map(str, sorted(wheels.glob(f"cu*/bin/{program}*"))), shutil.which(program)]     # first the one of NVVM's version
    return next(filter(None, found), None)


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


def assembled(ptxas, ptx, capability, folder, linked=False):
    """Assemble a kernel in a folder: the cubin's path, and ptxas's report.

    linked: as nvJitLink assembles PTX. Only then a call, such as a division of 64 bits is, makes all products of wgmma wait for each other.
    """
    path = Path(folder) / "kernel.ptx"
    path.write_text(ptx)
    own = re.search(r"^\.target (sm_\d+a)", ptx, re.M)      # for one GPU's own instructions
    architecture = own[1] if own else f"sm_{capability[0]}{capability[1]}"
    done = subprocess.run([ptxas, f"-arch={architecture}", "-v", *["-c"] * linked, str(path), "-o", str(path.with_suffix(".cubin"))],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return path.with_suffix(".cubin"), done.stderr


def show_loops(kernel, capability):
    """Print the number of instructions of each kind in a kernel's loops."""
    ptxas, nvdisasm = find("ptxas"), find("nvdisasm")
    if not ptxas or not nvdisasm:
        sys.exit("--loops needs ptxas and nvdisasm: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        code, _ = assembled(ptxas, kernel.ptx(capability), capability, folder)
        text = subprocess.run([nvdisasm, "-c", str(code)], check=True, capture_output=True, text=True).stdout
    for start, end, code in loops(text):
        kinds = collections.Counter(instruction.split()[0].split(".")[0] for instruction in code)
        print(f"{start:6}-{end}: {len(code)} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common(12))})")


def assemble(ptxas, ptx, capability, linked=False):
    """What a kernel's PTX uses, a dict.

    It has registers, spills, stack, shared and serialized. All but the registers are in bytes; serialized tells whether ptxas lets
    products of wgmma wait for each other.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, said = assembled(ptxas, ptx, capability, folder, linked)

    def number(pattern):
        return max(map(int, re.findall(pattern, said)), default=0)
    return {"registers": number(r"Used (\d+) registers"), "spills": number(r"(\d+) bytes spill stores"),
            "stack": number(r"(\d+) bytes stack frame"), "shared": number(r"(\d+) bytes smem"), "serialized": "serialized" in said}


def report(capability, target, pattern):
    """Print what each kernel uses -> the names of those that use too much.

    PTX of `capability` is assembled for `target`. pattern: a regular expression that names of kernels match.
    """
    ptxas, bad = find("ptxas"), []
    print(f"sm_{target[0]}{target[1]}")
    print(f"{'kernel':24} registers  spills   stack  shared" if ptxas else "ptxas was not found: kernels are compiled to PTX only")
    for name, kernel in KERNELS.items():
        if kernel.specific not in (None, target) or not re.fullmatch(pattern, name):
            continue
        ptx = kernel.ptx(target if kernel.specific or kernel.dependent else capability)
        if not ptxas:
            print(name)
            continue
        use = assemble(ptxas, ptx, target, linked=kernel.specific is not None and not kernel.lto)
        print(f"{name:24} {use['registers']:9} {use['spills']:7} {use['stack']:7} {use['shared']:7}")
        allowed = MAX_SPILLS if kernel.bounds[1] > 1 else 0
        if use["spills"] > allowed or use["stack"] > allowed and name not in LOCAL or use["serialized"]:
            bad.append(name)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", type=int, default=90, help="compute capability, e.g. 80 or 90")
    parser.add_argument("--assemble", type=int, metavar="CC", help="assemble the same PTX for this one too")
    parser.add_argument("--only", metavar="REGEX", default=".*", help="kernels whose names match as a whole")
    parser.add_argument("--loops", metavar="KERNEL", help="show the instructions of its loops")
    options = parser.parse_args()
    capability = divmod(options.cc, 10)
    if options.loops:
        if options.loops not in KERNELS:
            sys.exit(f"there is no kernel {options.loops}; there are {', '.join(sorted(KERNELS))}")
        show_loops(KERNELS[options.loops], capability)
        return
    targets = [capability] + ([divmod(options.assemble, 10)] if options.assemble else [])
    bad = [name for target in targets for name in report(capability, target, options.only)]
    if bad:
        sys.exit(f"spills, arrays in local memory, or serialized products: {', '.join(bad)}")


if __name__ == "__main__":
    main()
