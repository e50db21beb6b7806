"""How commands end: output that cannot be written, streams, signals, memory; and text that would control a terminal."""
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import click
import pytest
from click.testing import CliRunner

from pydsa.cli import main
from pydsa.cli.console import show
from pydsa.cli.exits import in_a_sentence, warnings_in_a_line
from pydsa.signals import interrupted
from pydsa.terminal import harmless, json_text, visible
from pydsa.text.answers import Piece

posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066"


def pydsa(*args, shell="", **options):
    """Run the command line by a shell, with redirections of it."""
    options = {"capture_output": True, "timeout": 120} | options
    return subprocess.run(["sh", "-c", f'"$0" -m pydsa "$@" {shell}', sys.executable, *map(str, args)], **options)


@pytest.fixture
def renamed(golden, tmp_path):
    """renamed(key, text) -> a model with another string for a key.

    It is at most as long as the old one.
    """
    def make(key, value):
        data, value = golden("ds32-q8_0")[0].read_bytes(), value.encode()
        start = data.index(key.encode()) + len(key) + 4
        n = int.from_bytes(data[start:start + 8], "little")
        assert len(value) <= n, n
        path = tmp_path / "model.gguf"
        path.write_bytes(data[:start + 8] + value.ljust(n) + data[start + 8 + n:])
        return path
    return make


# Output

@posix
@pytest.mark.parametrize("args", [("info", "MODEL"), ("info", "MODEL", "-o", "json"), ("info", "MODEL", "--check"), ("--help",)])
@pytest.mark.parametrize("shell, code, message", [
    (">&-", 2, "stdout is closed"), ("> /dev/full", 2, "cannot be written (No space left on device)"), ("| true; exit 0", 0, ""),
    ("2>&-", 0, ""), ("2> /dev/full", 0, "")])
def test_output_that_cannot_be_written(golden, args, shell, code, message):
    done = pydsa(*[golden("ds32-q8_0")[0] if a == "MODEL" else a for a in args], shell=shell)
    stderr = done.stderr.decode()
    assert done.returncode == code and message in stderr
    assert len(stderr.splitlines()) == (code == 2) and bool(done.stdout) == (code == 0 and "true" not in shell)


@posix
def test_a_reader_that_leaves_gives_141(golden):
    for args in (("info", golden("ds32-q8_0")[0]), ("run", golden("ds32-q8_0")[0], "-p", "Hello", "-t", "1", "-c", "300")):
        process = subprocess.Popen([sys.executable, "-m", "pydsa", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        stderr = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait() == 141 and all(line.startswith(("loading", "compiling")) for line in stderr.splitlines())


@posix
def test_no_stdin_is_an_empty_one(golden):
    done = pydsa("run", golden("ds32-q8_0")[0], "-n", 1, shell="<&-")
    assert done.returncode == 2 and done.stderr == b"Error: The prompt is empty.\n"


@posix
@pytest.mark.parametrize("args", [(), ("-f", "-")] + [("-f", "/proc/self/mem")] * os.path.exists("/proc/self/mem"))
def test_a_prompt_that_cannot_be_read(golden, args):
    done = pydsa("run", golden("ds32-q8_0")[0], *args, shell="0> /dev/null")
    assert done.returncode == 2 and done.stderr.startswith(b"Error: The prompt cannot be read from ") and done.stderr.count(b"\n") == 1


def test_a_pipe_is_utf8(renamed):
    """... also where its encoding has not the letters, as on Windows."""
    path = renamed("general.name", "深")
    for form in ("text", "json"):
        done = subprocess.run([sys.executable, "-m", "pydsa", "info", str(path), "-o", form], capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "cp1252"})
        assert done.returncode == 0 and "深".encode() in done.stdout


@posix
def test_memory_that_is_not_allowed(golden):
    import resource
    done = pydsa("run", golden("ds32-q8_0")[0], "-p", "hi", "-c", 30_000_000, "--device", "reference",
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
                 env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and "(ulimit -v); ask for a smaller context (-c)" in last and b"Traceback" not in done.stderr


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="Linux keeps to this limit")
@pytest.mark.parametrize("most", [150, 240])
def test_memory_that_does_not_hold_the_libraries(golden, most):
    """Importing them fails with a MemoryError, or an OSError of llvmlite."""
    import resource
    done = pydsa("run", golden("ds32-q8_0")[0], "-p", "hi",
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most << 20, most << 20)),
                 env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 2 and b"(ulimit -v)" in done.stderr and b"Traceback" not in done.stderr


def test_memory_that_is_refused():
    with pytest.raises(click.ClickException, match="not enough memory, .* smaller context"), in_a_sentence():
        raise MemoryError


def test_other_errors_stay_what_they_are():
    """A sentence would hide a fault of the program."""
    with pytest.raises(FileNotFoundError), in_a_sentence():
        open("/no/such/file")


@pytest.mark.parametrize("args, message", [
    (["look", "-o", ""], "the name is empty"), (["run", "--record", ""], "the name is empty"),
    (["run", "--tools", ""], "the name is empty"),
    (["quantize", "", "b", "Q8_0"], "the name is empty"), (["run", "-m", ""], "the name is empty"),
    (["imatrix", "--in-file", ""], "the name is empty"), (["run", "-f", HOSTILE], "No such file"),
    (["serve", "--timeout", "nan"], "nan is not a number"),
    (["run", "-ngl", ""], "-ngl is ''")])
def test_values_that_click_would_take(args, message):
    """... or show as they are, escape sequences among them."""
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.replace("\n", "").isprintable()


# Signals

def hear_signals():
    """Undo what a shell does to programs in its background.

    They ignore Ctrl-C, and under nohup a hangup.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def signalled(code, number, seconds=20):
    """The exit code of a Python program and its stderr.

    The signal comes when it prints a line.
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_signals)
    process.stdout.readline()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=seconds)
    return process.returncode, stderr.decode()


SLEEP = "import time; from pydsa import cli, __main__\ndef sleep(**_):\n    print(flush=True)\n    {}\n" \
        "cli.main.commands['info'].callback = sleep\n__main__.sys.argv[1:] = ['info', 'x']\n__main__.main()"


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals(number, code):
    met, stderr = signalled(SLEEP.format("time.sleep(100)"), number)
    assert met == code and stderr.strip() == ("[stopped]" if number == signal.SIGINT else "")


@posix
def test_what_an_interrupt_breaks_is_not_shown():
    """An interrupted library may raise something else: numba, RuntimeError."""
    code = "try: time.sleep(100)\n    finally: raise RuntimeError('half done')"
    assert signalled(SLEEP.format(code), signal.SIGINT) == (130, "\n[stopped]\n")


@posix
def test_what_follows_an_interrupt_at_once_is_its_effect():
    """Modules in C print the KeyboardInterrupt and raise an ImportError."""
    code = "try: time.sleep(100)\n    except KeyboardInterrupt: pass\n    raise ImportError('_dispatcher failed to import')"
    assert signalled(SLEEP.format(code), signal.SIGINT) == (130, "\n[stopped]\n")


@posix
def test_a_lost_interrupt_comes_again():
    """Python drops exceptions in finalizers and callbacks."""
    code = "class Slow:\n        def __del__(self): time.sleep(3)\n    Slow()\n    time.sleep(100)"
    began = time.monotonic()
    assert signalled(SLEEP.format(code), signal.SIGINT) == (130, "\n[stopped]\n") and time.monotonic() - began < 60


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_swallowed_signal_comes_again(number, code):
    """... which Python drops where it folds constants; what is being tidied up is not disturbed."""
    tidying = "try:\n        print(flush=True)\n        time.sleep(100)\n    except BaseException: pass\n    try: time.sleep(100)\n" \
              "    finally:\n        time.sleep(2.2)\n        print('tidy', file=__main__.sys.stderr)"
    assert signalled(SLEEP.replace("    print(flush=True)\n", "").format(tidying), number) == (code, "tidy\n")


@posix
def test_an_ignored_interrupt_stays_ignored():
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP.format('time.sleep(1)')}"
    assert signalled(code, signal.SIGINT) == (0, "")


def test_interrupted():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError from None
    except RuntimeError as error:
        assert interrupted(error) and not interrupted(RuntimeError())


# Text that would control a terminal

def test_visible():
    assert visible("深 a\u0301é") == "深 a\u0301é" and visible(HOSTILE) == "^[]0;owned^G^[[2J<U+009B>31m<U+202E>evil<U+2066>"
    assert visible("a\nb\t\u200b\x7f\ud800") == "a b^I<U+200B>^?<U+D800>" and visible("a\nb\r", keep="\n") == "a\nb^M"


def test_harmless():
    assert harmless(HOSTILE + "\na\tb\r") == "^[]0;owned^G^[[2J<U+009B>31m<U+202E>evil<U+2066>\na\tb^M"
    assert harmless("خ\u200cا 👩\u200d🚀") == "خ\u200cا 👩\u200d🚀"       # joiners are part of words and of emoji


def test_json_text():
    value = {HOSTILE: ["é深", "\ud800", "\U000e0041", 1.5, None]}
    for indent in (None, 1):
        text = json_text(value, indent)
        assert json.loads(text) == value and "é深" in text and text.replace("\n", "").isprintable()
    assert json_text([{"error": float("inf")}, (float("nan"), 1.5)]) == '[{"error": null}, [null, 1.5]]'


@pytest.mark.parametrize("form", ["text", "json"])
def test_info_shows_a_hostile_file(renamed, form):
    done = pydsa("info", renamed("tokenizer.ggml.pre", "\x1b[2J\x9b"), "-o", form) if os.name != "nt" else None
    assert done.returncode == 0 and b"\x1b" not in done.stdout and "\x9b" not in done.stdout.decode()
    assert (b"^[[2J<U+009B>" if form == "text" else b"\\u001b[2J\\u009b") in done.stdout


@pytest.mark.parametrize("terminal, expected", [(True, "^[[2Jx\n"), (False, "\x1b[2Jx\n")])
@pytest.mark.parametrize("kind, stream", [("answer", "stdout"), ("reasoning", "stderr")])
def test_generated_text_controls_no_terminal(monkeypatch, kind, stream, terminal, expected):
    """... and a pipe gets it as it is."""
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, stream, out)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(click.utils, "should_strip_ansi", lambda *args: False)
    show(Piece(text, kind) for text in ("\x1b[2J", "x\n"))
    assert out.getvalue() == expected


def test_a_warning_is_a_line(capsys):
    with warnings_in_a_line():
        warnings.warn("a\nfile says \x1b[2J", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a file says ^[[2J\n"
