"""House rules as checks: who may import what, what importing costs, how long a file may be, equal backends."""
import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from pydsa.backends import cpu, reference
from pydsa.graph import Graph

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pydsa").rglob("*.py"))
SLOW = ("numba", "llvmlite", "tokenizers", "jinja2", "rich", "matplotlib")

# Each may import itself, those after it, and the leaves; a leaf only other leaves.
LAYERS = ("__main__", "cli", "bench report plot", "__init__", "model", "session", "models", "plan graph costs",
          "backends", "quants", "lanes", "simd", "jit")
LEAVES = "gguf_file tokenizer chat template sampling cache compiling kernel_cache errors"
RANK = {name: rank for rank, names in enumerate([*LAYERS, LEAVES]) for name in names.split()}
COMPILING = ("pydsa.backends.cpu", "pydsa.backends.cuda", "pydsa.quants.", "pydsa.lanes", "pydsa.simd", "pydsa.jit")    # may import numba

NOT_OPS = {"weight", "cache_rows", "cache_bytes", "empty", "upload", "fetch", "store", "timed", "recorded", "free_bytes",
           "compile_calls", "check_threads", "entry_point", "set_threads", "measure_ceilings"}
FUNCTIONS = {name for name, f in vars(reference).items() if inspect.isfunction(f) and not name.startswith("_")}


def module(path):
    """pydsa/models/yarn.py -> pydsa.models.yarn; a package's name is its folder's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imports(path):
    """The modules that a file imports anywhere in it, by full name; other than modules come with the name of their module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] == "pydsa"}


def part(name):
    """pydsa.models.yarn -> models; pydsa itself -> __init__"""
    return (name.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("name", MODULES)
def test_import_direction(name):
    assert part(name) in RANK, f"{name}: give it a place in LAYERS or LEAVES"
    above = {target for target in ours(MODULES[name]) if RANK[part(target)] < RANK[part(name)]}
    assert not above, f"{name} imports what is above it"


def test_no_import_cycles():
    graphlib.TopologicalSorter({name: ours(path) - {name} for name, path in MODULES.items()}).prepare()


def test_reference_stands_alone():
    assert {name.split(".")[0] for name in imports(ROOT / "pydsa/backends/reference.py")} == {"numpy", "gguf", "time"}


@pytest.mark.parametrize("name", MODULES)
def test_who_may_import_numba(name):
    if not name.startswith(COMPILING):
        assert not {target.split(".")[0] for target in imports(MODULES[name])} & {"numba", "llvmlite"}


@pytest.mark.parametrize("name", MODULES)
def test_only_the_cuda_backend_imports_numba_cuda(name):
    nodes = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.ImportFrom)]
    found = any(node.module.startswith("numba.cuda") or node.module == "numba" and "cuda" in [a.name for a in node.names] for node in nodes)
    assert not found or name.startswith("pydsa.backends.cuda")


@pytest.mark.parametrize("name", ["pydsa", "pydsa.quants", "pydsa.model", "pydsa.cli", "pydsa.plot", "pydsa.backends.reference"])
def test_importing_is_cheap(name):
    code = f"import sys, {name}; print([m for m in {SLOW} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_prints(name):
    calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert part(name) in ("cli", "__main__") or not prints


@pytest.mark.parametrize("folder", ["pydsa", "tests", "tools"])
def test_files_are_short(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)


def test_the_graph_records_every_op():
    assert {name for name in vars(Graph) if not name.startswith("_")} == FUNCTIONS - NOT_OPS | {"value", "last_rows"}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_backends_have_the_same_parameters(name):
    backends = [cpu] + ([importlib.import_module("pydsa.backends.cuda")] if importlib.util.find_spec("numba_cuda") else [])
    for backend in backends:
        mine, theirs = (inspect.signature(getattr(f, "py_func", f)) for f in (getattr(backend, name), getattr(reference, name)))
        assert [(p.name, p.default) for p in mine.parameters.values()] == [(p.name, p.default) for p in theirs.parameters.values()]


def test_any_kernel_can_be_the_first():
    """The thread count is read through a symbol that numba defines when it launches its threads; without it LLVM aborts the process."""
    code = "import numba; from pydsa.backends.cpu.linear import rows_a_task; assert numba.njit(lambda: rows_a_task(100, True))() >= 4"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
