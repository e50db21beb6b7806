"""The terminal: messages of several lines, reasoning beside answers, history, and options of llama.cpp."""
import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_cli import Terminal, pydsa, run

from pydsa.cli import console

from pydsa.cli import main
from pydsa.cli.console import Writer, answer, read_message, show
from pydsa.cli.habits import INSTEAD, SO_ANYWAY
from pydsa.errors import OutOfMemoryError, PydsaError
from pydsa.fitting import longest_context
from pydsa.machine import limits
from pydsa.session import Session
from pydsa.setup import Setup
from pydsa.text.answers import Piece


@pytest.fixture(scope="module")
def model(golden):
    return golden("ds32-q8_0")[0]


class Lines:
    """A console on which somebody types these lines."""

    def __init__(self, *lines):
        self.lines, self.prompts = list(lines), []

    def input(self, prompt, markup):
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


# Messages

@pytest.mark.parametrize("lines, message", [
    (["one", "two"], "one"), (["one\\", "two\\", "three", "four"], "one\ntwo\nthree"),
    (['"""one', "", ' two"""  ', "three"], "one\n\n two"),
    (['"""', "one", '"""', "two"], "one"), (['"""one"""', "two"], "one"), (['"""a\\', 'b\\"""', "c"], "a\\\nb\\"),
    (["pasted\nlines", "two"], "pasted\nlines"), (["", "x"], "")])
def test_a_message_of_several_lines(lines, message, monkeypatch):
    monkeypatch.setattr(console, "_pasted", list)
    typed = Lines(*lines)
    assert read_message(typed) == message
    assert typed.prompts[0] == "> " and set(typed.prompts[1:]) <= {". "}


def test_a_block_that_does_not_end(monkeypatch):
    monkeypatch.setattr(console, "_pasted", list)
    with pytest.raises(EOFError):
        read_message(Lines('"""one'))


READ = """
from rich.console import Console
from pydsa.cli.console import line_editor, read_message
line_editor()
while True:
    print("GOT", repr(read_message(Console(stderr=True, highlight=False))))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("editor", [True, False])
def test_pasted_lines_are_one_message(editor, tmp_path, monkeypatch):
    """With GNU readline, and without a line editor, as where stdout is a file."""
    if editor and "GNU readline" not in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("the line editor is not GNU readline")
    (tmp_path / "read.py").write_text(READ)
    start = [sys.executable, str(tmp_path / "read.py")]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    terminal = Terminal(*start) if editor else Terminal("/bin/sh", "-c", f"{' '.join(start)} | cat")
    terminal.expect("> ")
    terminal.send("\x1b[200~one\ntwo\x1b[201~\n" if editor else "one\ntwo\n")
    if not editor:
        terminal.expect("two")
        terminal.send("\x04")       # ends the program, and so the buffer of its pipe is written
    terminal.expect(r"GOT 'one\\ntwo'", 20)
    os.kill(terminal.pid, signal.SIGKILL)
    os.waitpid(terminal.pid, 0)


# Reasoning

THOUGHT = [Piece("<think>", "markup"), Piece("Hm", "reasoning"), Piece(".", "reasoning"), Piece("</think>", "markup"),
           Piece("2"), Piece("!")]


@pytest.mark.parametrize("terminal, color, expected", [(True, True, "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\n"), (True, False, "Hm.\n"),
                                                       (False, True, "Hm.\n")])
def test_reasoning_goes_to_stderr_dimmed_on_a_terminal(terminal, color, expected, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.delenv("NO_COLOR", raising=False) if color else monkeypatch.setenv("NO_COLOR", "1")
    show(iter(THOUGHT))
    assert (out.getvalue(), err.getvalue()) == ("2!", expected)
    show(iter(THOUGHT[:3]))                 # a line break also where it ends in reasoning
    assert (out.getvalue(), err.getvalue()) == ("2!", expected * 2)


@pytest.fixture
def thinker(load, model, monkeypatch):
    """A model whose answers begin with reasoning."""
    engine = load(model)

    def sample(self, logits, max_tokens=None, sampling=None, constraint=None):
        yield from engine.tokenize("Hm.</think>2")
    monkeypatch.setattr(Session, "sample", sample)
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }};{% endfor %}"
                                                           "{{ '<think>' if thinking else '</think>' }}")
    return engine


def test_history_has_reasoning_apart(thinker, capsys):
    writer, question = Writer(thinker, None, None), {"role": "user", "content": "1+1?"}
    messages = answer(thinker, writer, [question], True)
    assert messages == [question, {"role": "assistant", "content": "2", "reasoning_content": "Hm."}]
    assert capsys.readouterr().out == "2\n"
    answer(thinker, writer, [*messages, question], True)
    assert thinker.tokenizer.decode(writer.session.tokens[1:]) == "1+1?;2;1+1?;<think>"     # this template leaves reasoning out
    assert answer(thinker, Writer(thinker, None, None, "</think>"), [question], True)[1]["content"] == ""


# Options

def test_stop_and_bias(model):
    common = ("-p", "Hello", "-n", 12, "--temp", 0)
    whole = run(model, *common).stdout
    stop = whole[3:5]
    for name in "--stop", "-r", "--reverse-prompt":
        assert run(model, *common, name, stop, name, "\x07").stdout == whole[:whole.index(stop)]
    biased = run(model, *common, "--logit-bias", "30+1e6").stdout
    assert biased == run(model, *common, "--logit-bias", "30+100000").stdout != whole


def test_options_of_llama_cpp_that_work(model, load):
    common = ("-t", 1, "-c", 200, "-n", 9, "--temp", 0)
    assert pydsa("run", "-m", model, "-p", "Hello", *common, *SO_ANYWAY, "-s", -1).stdout == run(model, *common, "-p", "Hello").stdout
    assert run(model, *common, "-p", "Once upon", "-no-cnv").stdout == run(model, *common, "-p", "Once upon", "--raw").stdout
    assert run(model, "-p", "x", "-n", 0, "-sys", "Be brief.").exit_code == 0
    result = pydsa("run", model, "-t", 1, "-p", "x", "-n", 1, "-c", 0)
    assert "a context of 4096 tokens, the model's own" in result.stderr and result.exit_code == 0
    assert "4096 tokens of context" in pydsa("info", "-m", model, "-c", 0).stdout


def test_the_docs_name_options_that_are_refused():
    page = (Path(__file__).parents[1] / "pydsa/docs/chat.md").read_text()
    named = re.findall("`(-[^`]+)`", page.partition("nothing here, like ")[2].partition("end with a sentence")[0])
    assert len(named) > 2 and {name for names in INSTEAD for name in names}.issuperset(named)


@pytest.mark.parametrize("name", [name for names in INSTEAD for name in names])
def test_options_of_llama_cpp_that_end_with_a_sentence(name, model):
    for command in "run", "bench", "info", "trace":
        for given in [name, "1"], [f"{name}=1"]:
            result = pydsa(command, *given, "-m", model)
            assert result.exit_code == 2 and result.stdout == "" and f"{name} is an option of llama.cpp: " in result.stderr


@pytest.mark.parametrize("args, message", [
    (["run", "MODEL", "-m", "MODEL", "-p", "x"], "The model is given twice"), (["info"], "Missing argument"),
    (["run", "MODEL", "-cnv", "-p", "x"], "-cnv chats on a terminal"), (["run", "MODEL", "-p", "x", "--logit-bias", "5"], "like 15043+1"),
    (["run", "MODEL", "-p", "x", "--logit-bias", "x+1"], "like 15043+1"), (["run", "MODEL", "-p", "x", "--logit-bias", "1+nan"], "nan"),
    (["run", "MODEL", "-p", "x", "--logit-bias", "512-1"], "has the token 512, expected ids from 0 to 511"),
    (["run", "MODEL", "-p", "x", "--stop", ""], "stop is"), (["run", "MODEL", "-p", "x", "-s", "-2"], "-2 is not in the range x>=-1"),
    (["bench", "MODEL", "--attention", "dense,x"], "attention is 'x'")])
def test_options_that_are_mistaken(args, message, model):
    result = pydsa(*(model if arg == "MODEL" else arg for arg in args))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [["run", "MODEL", "-p", "x", "--stop", ""], ["bench", "MODEL", "--attention", "dense,x"]])
def test_mistakes_that_are_met_before_the_model_is_read(args, model):
    assert "loading" not in pydsa(*(model if arg == "MODEL" else arg for arg in args)).stderr


def test_biases_are_checked_before_the_prompt_is_read(model, load):
    assert "first token" not in run(model, "-p", "x", "--logit-bias", "512-1").stderr
    with pytest.raises(PydsaError, match="has the token 512, expected ids from 0 to 511"):
        load(model).generate("x", logit_bias={512: 1})      # the iterator is not asked for anything


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no file without end here")
def test_a_prompt_without_end():
    result = pydsa("run", "-f", "/dev/zero")
    assert result.exit_code == 2 and "more than 8000000 characters" in result.stderr


def test_help_is_free_of_them():
    text = CliRunner().invoke(main, ["run", "--help"]).output
    assert "-mg" not in text and "--jinja" not in text and "-cnv" not in text


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.98, 1.2])
def test_a_context_as_long_as_memory_allows(share, model, monkeypatch):
    own = Setup(model, 4096).total_bytes
    free = own * share

    monkeypatch.setattr(limits, "available", lambda: limits.Memory(int(free), "memory are free"))
    if share < 0.1:
        with pytest.raises(OutOfMemoryError, match="a context of 256 tokens would take"):
            longest_context(model)
        return
    n_ctx, whole = longest_context(model)
    assert whole == (share > 1.1) == (n_ctx == 4096)
    assert whole or n_ctx % 256 == 0 and Setup(model, n_ctx).total_bytes * 1.1 <= free < Setup(model, n_ctx + 512).total_bytes * 1.1
