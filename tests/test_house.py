"""House rules as checks: who may import what, what importing costs, how long a file may be, equal backends."""
import ast
import functools
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pydsa import quants
from pydsa.backends import cpu, reference
from pydsa.executor.graph import Graph

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "pydsa").rglob("*.py"))
SLOW = ("numba", "llvmlite", "tokenizers", "jinja2", "rich", "matplotlib", "starlette", "uvicorn", "pydantic", "llguidance",
        "ray")

# Each may import itself, those after it, and the leaves; a leaf only other leaves.
LAYERS = ("__main__", "cli", "server", "conversion", "faithful imatrix quantization", "quality", "bench", "__init__", "engine loading",
          "stages", "model", "look", "session", "stepping", "recordings", "selections", "diagnosis", "fitting", "setup", "words", "models",
          "executor", "backends")
LEAVES = "gguf chat sampling compiling kernel_cache quants errors terminal signals options cards drawing " \
         "targets saved text machine"
RANK = {name: rank for rank, names in enumerate([*LAYERS, LEAVES]) for name in names.split()}
COMPILING = ("pydsa.backends.cpu", "pydsa.backends.cuda", "pydsa.quantization")     # may import numba

NOT_OPS = {"weight", "cache_rows", "cache_bytes", "empty", "upload", "fetch", "store", "timed", "recorded", "free_bytes", "nan_met",
           "compile_calls", "check_threads", "set_threads", "measure_ceilings", "measure_bus", "form_costs"}
FUNCTIONS = {name for name, f in vars(reference).items() if inspect.isfunction(f) and not name.startswith("_")}


def module(path):
    """The name of a module: pydsa/models/yarn.py -> pydsa.models.yarn."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


@functools.cache
def nodes(path):
    """The nodes of a file's syntax tree, parsed once for all tests."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
    """The modules that a file imports, anywhere in it, by full name."""
    for node in nodes(path):
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


def test_import_direction():
    unplaced = [name for name in MODULES if part(name) not in RANK]
    assert not unplaced, "give them a place in LAYERS or LEAVES"
    above = [(name, target) for name, path in MODULES.items() for target in ours(path) if RANK[part(target)] < RANK[part(name)]]
    assert not above, "these import what is above them"


def test_no_import_cycles():
    graphlib.TopologicalSorter({name: ours(path) - {name} for name, path in MODULES.items()}).prepare()


def test_no_module_is_imported_by_a_name_that_an_op_has_too():
    """`from pydsa.backends.cuda import linear` may be the module or the op."""
    named = {name: [(node.module, alias.name) for node in nodes(path) if isinstance(node, ast.ImportFrom) for alias in node.names]
             for name, path in MODULES.items()}
    ops = {(name, what) for name, path in MODULES.items() if path.name == "__init__.py" for module, what in named[name]
           if f"{name}.{what}" in MODULES and f"{module}.{what}" not in MODULES}
    assert ("pydsa.backends.cuda", "linear") in ops and not [name for name in named if ops & set(named[name])]


def test_reference_stands_alone():
    assert set(imports(ROOT / "pydsa/backends/reference.py")) <= {"numpy", "gguf", "gguf.quants", "pydsa.backends.host"}


def test_who_may_import_numba():
    found = [name for name, path in MODULES.items() if {target.split(".")[0] for target in imports(path)} & {"numba", "llvmlite"}]
    assert found and all(name.startswith(COMPILING) for name in found), found


def test_only_the_cuda_backend_imports_numba_cuda():
    found = [name for name, path in MODULES.items() for node in nodes(path) if isinstance(node, ast.ImportFrom) and (
        node.module.startswith("numba.cuda") or node.module == "numba" and "cuda" in [a.name for a in node.names])]
    assert found and all(name.startswith("pydsa.backends.cuda") for name in found), found


@pytest.mark.parametrize("name", ["pydsa", "pydsa.quants", "pydsa.model", "pydsa.cli", "pydsa.cli.plot", "pydsa.imatrix",
                                  "pydsa.quantization", "pydsa.conversion", "pydsa.backends.reference", "pydsa.backends.gpus",
                                  "pydsa.backends.transfers", "pydsa.stages.running", "pydsa.stages.actors"])
def test_importing_is_cheap(name):
    code = f"import sys, {name}; print([m for m in {SLOW} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_only_the_command_line_prints():
    prints = [(name, node.lineno) for name, path in MODULES.items() for node in nodes(path)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert all(part(name) in ("cli", "__main__") for name, _ in prints), prints


@pytest.mark.parametrize("folder", ["pydsa", "tests", "tools"])
def test_files_are_short(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)


# Functions of more than 60 lines. The list may only shrink.
LONG = {}


def functions(path):
    return [node for node in nodes(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("folder", ["pydsa", "tests", "tools"])
def test_functions_are_short(folder):
    long = {f"{path.relative_to(ROOT).as_posix()}:{node.name}": node.end_lineno - node.lineno + 1
            for path in (ROOT / folder).rglob("*.py") for node in functions(path) if node.end_lineno - node.lineno >= 60}
    listed = {name for name in LONG if name.startswith(folder + "/")}
    assert long.keys() == listed, "split what is new, take what is short now off the list"
    assert all(long[name] <= LONG[name] for name in listed)


def first_sentence(docstring):
    return re.split(r"(?<=[.:!?])\s", " ".join(docstring.split("\n\n")[0].split()))[0]


@pytest.mark.parametrize("folder", ["pydsa", "tests", "tools"])
def test_docstrings_begin_with_a_short_sentence(folder):
    """So that the tree can be scanned, in the docs and in an editor."""
    long = [f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}: {first_sentence(docstring)}"
            for path in sorted((ROOT / folder).rglob("*.py")) for node in nodes(path)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (docstring := ast.get_docstring(node)) and len(first_sentence(docstring)) > 72]
    assert not long, "\n".join(long)


FORMATS = {"f32", "int16", "bf16x2", "int8x2", "f16x2", "f16"}
FILES_OF_A_FORMAT = {"linear", "attention", "mha", "indexer"} | {    # ops; what they share, and parts of products in wgmma
    "__init__", "gemm", "gemv", "gemv_scores", "panels", "tiles", "gemm_rows", "halves", "offsets", "stages", "words_q4_k", "words_rows"}


def number_format(name):
    """The number format of a module: f32 of pydsa.backends.cpu.f32.mha."""
    parts = name.split(".")
    return parts[3] if len(parts) > 3 and parts[3] in FORMATS else None


def test_formats_do_not_import_each_other():
    formats = [name for name in MODULES if number_format(name)]
    others = [(name, target) for name in formats for target in ours(MODULES[name])
              if number_format(target) not in (None, number_format(name))]
    assert formats and not others, "these import another number format"


def test_files_of_a_format_bear_the_name_of_an_op():
    assert {path.stem for name, path in MODULES.items() if number_format(name)} <= FILES_OF_A_FORMAT


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_backends_have_kernels_for_every_type():
    from pydsa.backends.cpu.blocks import BLOCKS
    from pydsa.backends.cuda.blocks import GROUPED
    from pydsa.backends.cuda.blocks.floats import FLOATS
    assert set(BLOCKS) == set(quants.TYPES) == set(GROUPED) | set(FLOATS)
    assert set(GROUPED) == {name for name, block in BLOCKS.items() if block.dot} == {
        name for name, kind in quants.TYPES.items() if kind.quantized}


def names_of_devices(path):
    """Lines with the name of a device that is no argument's default."""
    defaults = {(node.lineno, node.col_offset) for function in nodes(path) if isinstance(function, ast.FunctionDef)
                for node in function.args.defaults}
    return [node.lineno for node in nodes(path) if isinstance(node, ast.Constant) and node.value in ("cpu", "cuda", "reference")
            and (node.lineno, node.col_offset) not in defaults]


def test_only_backends_tell_devices_apart():
    """By name: an option's default is the only use of one, beside the table of devices and the command line."""
    used = {name: lines for name, path in MODULES.items() if not name.startswith(("pydsa.backends", "pydsa.cli"))
            and (lines := names_of_devices(path))}
    assert not used


def test_the_graph_records_every_op():
    assert {name for name in vars(Graph) if not name.startswith("_")} == FUNCTIONS - NOT_OPS | {"value", "last_rows", "hidden"}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_backends_have_the_same_parameters(name):
    backends = [cpu] + ([importlib.import_module("pydsa.backends.cuda")] if importlib.util.find_spec("numba_cuda") else [])
    for backend in backends:
        mine, theirs = (inspect.signature(getattr(f, "py_func", f)) for f in (getattr(backend, name), getattr(reference, name)))
        assert [(p.name, p.default) for p in mine.parameters.values()] == [(p.name, p.default) for p in theirs.parameters.values()]
