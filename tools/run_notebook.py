"""Run the tour, or another notebook, and store in it what its cells show.

    python tools/run_notebook.py                    # pydsa/docs/tour.ipynb
    python tools/run_notebook.py notebook.ipynb

Cells are plain Python: they run in this process, in one namespace. What is shown is what Jupyter shows: what a cell prints, the value of
its last line, and matplotlib's figures. Of what is longer than MOST only a picture or a line is stored.
"""
import ast
import base64
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "pydsa/docs/tour.ipynb"
MOST = 20_000       # characters of an output's HTML that are stored
DPI = 80


def code_cells(notebook):
    """The code cells of a notebook that was read as JSON."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook):
    """Run the code cells of a notebook -> a list of outputs for each.

    Raises what a cell raises.
    """
    import matplotlib
    matplotlib.use("agg")
    names, outputs = {"__name__": "__main__"}, []
    for cell in code_cells(notebook):
        outputs.append(_run_cell("".join(cell["source"]), names))
    return outputs


def _run_cell(source, names):
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(last, "<cell>", "eval"), names)
    outputs = [{"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())}] if printed.getvalue() else []
    figures = _figures()
    if value is not None and not source.rstrip().endswith(";"):
        outputs.append({"data": _shown(value), "metadata": {}, "output_type": "execute_result"})
    return outputs + [{"data": {"image/png": figure, "text/plain": ["<Figure>"]}, "metadata": {}, "output_type": "display_data"}
                      for figure in figures]


def _shown(value):
    """What is stored of a value: {MIME type: lines}."""
    data = {"text/plain": _lines(_plain(repr(value)))}
    page = value._repr_html_() if hasattr(value, "_repr_html_") else ""
    if page and len(page) <= MOST:
        data["text/html"] = _lines(_plain(page))
    elif page and hasattr(value, "png"):
        with tempfile.TemporaryDirectory() as folder:
            value.png(Path(folder) / "picture.png")
            data["image/png"] = _base64((Path(folder) / "picture.png").read_bytes())
    return data


def _plain(text):
    """A text without the place of this checkout."""
    return text.replace(str(ROOT), "...")


def _lines(text):
    return text.splitlines(keepends=True)


def _base64(data):
    return base64.b64encode(data).decode() + "\n"


def _figures():
    """The open figures of pyplot as PNGs in base 64; they are closed."""
    from matplotlib import pyplot
    found = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        found.append(_base64(file.getvalue()))
    pyplot.close("all")
    return found


def store(notebook, outputs):
    """Put outputs into the code cells of a notebook."""
    for i, (cell, shown) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"] = i
        cell["outputs"] = [output | {"execution_count": i} if output["output_type"] == "execute_result" else output for output in shown]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TOUR
    notebook = json.loads(path.read_text(encoding="utf-8"))
    store(notebook, run(notebook))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
