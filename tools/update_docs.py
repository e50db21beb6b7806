"""Write the generated pages of pydsa/docs: the tree and the help of every command.

    python tools/update_docs.py           # rewrite tree.md and cli.md
    python tools/update_docs.py --check   # exit 1 if one is not up to date
"""
import ast
import re
import sys
from pathlib import Path

from click.testing import CliRunner

from pydsa.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "pydsa/docs"
COMMANDS = ["", *sorted(main.commands)]
LINES = {"setup.cfg": "Metadata, dependencies, pytest and linter", "pyproject.toml": "The build system, for pip",
         ".ci/run": "What CI runs: the commands of the README, then the linter",
         "pydsa/docs": "These pages", "pydsa/docs/tour.ipynb": "A notebook: load, ask, compare, look, change the choice",
         "pydsa/docs/journal": "What was tried for speed, predicted and measured",
         "pydsa/demo": "The demo model, its figures, and notes to ask it about",
         "tests/data": "Golden logits and tokenizations from outside"}


def cli_page():
    """The --help of every command, as fenced blocks."""
    blocks = []
    for name in COMMANDS:
        text = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="pydsa", terminal_width=110, color=False).output
        blocks.append(f"```text\n$ pydsa {name + ' ' if name else ''}--help\n{text.rstrip()}\n```")
    return "# Command line\n\nMade by `tools/update_docs.py`.\n\n" + "\n\n".join(blocks) + "\n"


def first_sentence(path):
    """The first sentence of a module's docstring; "" where there is none."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s|\.$", docstring.split("\n\n")[0].replace("\n", " "))[0]


def tree_page():
    """A line a file."""
    modules = sorted(path.relative_to(ROOT).as_posix() for part in ("pydsa", "tests", "tools") for path in (ROOT / part).rglob("*.py"))
    lines = LINES | {path: text for path in modules if (text := first_sentence(path))}
    width = max(map(len, lines)) + 2
    table = "\n".join(f"{path:{width}}{text}" for path, text in lines.items())
    return f"# The tree\n\nMade by `tools/update_docs.py` from the modules' docstrings.\n\n```text\n{table}\n```\n"


PAGES = {"cli.md": cli_page, "tree.md": tree_page}

if __name__ == "__main__":
    old = {name: (DOCS / name).read_text(encoding="utf-8") if (DOCS / name).exists() else "" for name in PAGES}
    new = {name: page() for name, page in PAGES.items()}
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "pydsa/docs is not up to date: run python tools/update_docs.py")
    for name, text in new.items():
        (DOCS / name).write_text(text, encoding="utf-8")
