"""Write the parts of README.md that are generated: the tree, from the modules' docstrings, and the help of every command.

    python tools/update_readme.py           # rewrite README.md
    python tools/update_readme.py --check   # exit 1 if it is not up to date
"""
import ast
import re
import sys
from pathlib import Path

from click.testing import CliRunner

from pydsa.cli import main

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["", *sorted(main.commands)]
LINES = {"setup.cfg": "Metadata, dependencies, pytest and linter", "pyproject.toml": "The build system, for pip",
         ".ci/run": "What CI runs: the commands of this page, then the linter",
         "pydsa/docs/journal": "Journals: what was tried for speed, predicted and measured",
         "pydsa/demo": "The demo model, its figures, and notes to ask it about",
         "tests/data": "Golden logits and tokenizations from outside"}


def help_text():
    """The --help of every command, as fenced blocks."""
    blocks = []
    for name in COMMANDS:
        text = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="pydsa", terminal_width=110, color=False).output
        blocks.append(f"```text\n$ pydsa {name + ' ' if name else ''}--help\n{text.rstrip()}\n```")
    return "\n\n".join(blocks)


def summary(path):
    """The first sentence of a module's docstring; "" where there is none."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s|\.$", docstring.split("\n\n")[0].replace("\n", " "))[0]


def tree():
    """A line a file."""
    modules = sorted(path.relative_to(ROOT).as_posix() for part in ("pydsa", "tests", "tools") for path in (ROOT / part).rglob("*.py"))
    lines = LINES | {path: text for path in modules if (text := summary(path))}
    return "```text\n" + "\n".join(f"{path:33} {text}" for path, text in lines.items()) + "\n```"


def updated(text):
    """README.md's text with the generated parts made anew."""
    for mark, part in (("tree", tree()), ("help", help_text())):
        begin, end = f"<!-- {mark}: made by tools/update_readme.py -->", f"<!-- end of {mark} -->"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = updated(old)
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "README.md is not up to date: run python tools/update_readme.py")
    readme.write_text(new, encoding="utf-8")
