"""The terminal: progress bars, streamed answers and the chat loop."""
import contextlib
import io
import os
import re
import select
import sys
import time

import click

from pydsa.cli.restrictions import Restrictions
from pydsa.errors import ContextFullError, PydsaError, sentence
from pydsa.terminal import harmless, json_text, visible

CHAT_HELP = """/help  this list
/clear  forget the conversation
/exit  leave (also Ctrl-D)
Ctrl-C  stop a reply
\"\"\"  begins and ends a message of several lines; so does a \\ at the end of a line; pasted lines are one message"""


@contextlib.contextmanager
def progress_bar(what):
    """A context with a callback progress(done, total, item="") for stderr.

    It shows a bar on a terminal, else a line every two seconds at most.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(),
               TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[item]}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, item="", visible=False)
        yield lambda done, total, item="": bar.update(task, completed=done, total=total, item=visible(item), visible=True)


def _progress_lines(what):
    last = time.monotonic()

    def show(done, total, item=""):
        nonlocal last
        if time.monotonic() - last >= 2 and done < total:
            last = time.monotonic()
            click.echo(f"{what}: {done:.0f} of {total} {visible(item)}", err=True)
    return show


def use_utf8():
    """Make pipes UTF-8 whatever the locale is.

    A terminal keeps its encoding, and shows "?" for what it cannot encode.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


class Writer:
    """Streams the answers of one session: the answer to stdout, reasoning to stderr.

    On a terminal reasoning is dimmed, and what would control the terminal is shown; a pipe or a file gets every byte. It keeps the Reply
    and the figures of the last answer, for the conversation and for summary().
    """

    def __init__(self, model, sampling, max_tokens, stop=None, restrictions=Restrictions()):
        self.model, self.sampling, self.max_tokens, self.stop = model, sampling, max_tokens, stop
        self.restrictions = restrictions
        self.session, self.reply = model.session(), None
        self.n_prompt = self.n_generated = 0

    def write(self, prompt, thinking=False):
        """Generate the answer to a chat.Prompt, and write it.

        The prefix that the session has already is not run again. `reply` becomes the answers.Reply, as far as it came. thinking: whether
        the model was asked to reason.
        """
        from pydsa.text.answers import Reader
        reader = Reader(self.model.tokenizer, self.stop, prompt.layout)
        self.reply, self.n_prompt, self.n_generated = reader.reply, 0, 0
        self.prompt_seconds = self.seconds = 0.0
        constraint = self.restrictions.constraint(self.model.tokenizer, prompt.layout, thinking)
        start, n_reused = time.perf_counter(), self.session.reuse(prompt.ids)
        with progress_bar("reading the prompt") as progress:
            logits = self.session.prefill(prompt.ids[n_reused:], progress)
        self.n_prompt, self.prompt_seconds = len(prompt.ids) - n_reused, time.perf_counter() - start

        def timed(tokens):
            for token in tokens:
                self.n_generated += 1
                self.seconds = time.perf_counter() - start - self.prompt_seconds
                yield token

        tokens = timed(self.session.sample(logits, self.max_tokens, self.sampling, constraint))
        show(reader.read(tokens, self.max_tokens, len(prompt.ids)))

    def summary(self):
        """One line: speeds, time to the first token, the attention in use."""
        from pydsa.words import attention_in_words

        def speed(n, seconds):
            return f"{n / seconds:.1f} t/s" if n > 0 and seconds > 0 else "- t/s"
        return (f"prompt {self.n_prompt} tokens, {speed(self.n_prompt, self.prompt_seconds)}; "
                f"generation {self.n_generated} tokens, {speed(self.n_generated - 1, self.seconds)}; "
                f"first token after {self.prompt_seconds:.2f} s; attention {attention_in_words(self.model.setup)}")


def show(pieces):
    """Write pieces of an answer as they come.

    The answer goes to stdout, each call of a tool as a line of JSON, and reasoning to stderr, dimmed on a terminal, with a line break after
    it. What would control a terminal is shown there.
    """
    thought, begun, safe = "", False, {stream: harmless if stream.isatty() else str for stream in (sys.stdout, sys.stderr)}
    try:
        for piece in pieces:
            if piece.kind == "reasoning":
                thought = piece
                text = safe[sys.stderr](piece)
                click.echo(text if "NO_COLOR" in os.environ else click.style(text, dim=True), nl=False, err=True)
            elif piece.kind == "answer":
                thought, begun = _end_line(thought), not piece.endswith("\n")
                sys.stdout.write(safe[sys.stdout](piece))
                sys.stdout.flush()
            elif piece.kind == "tool_call":
                thought = _end_line(thought)
                sys.stdout.write("\n" * begun + json_text(piece.call) + "\n")
                sys.stdout.flush()
                begun = False
    finally:
        _end_line(thought)


def _end_line(text):
    """End the line of a text on stderr, unless it is ended; returns ""."""
    if text and not text.endswith("\n"):
        click.echo("", err=True)
    return ""


def read_message(console, prompt="> "):
    """Read a message from the terminal: a line, or several.

    Several are lines between two \"\"\", lines with a backslash at their end and the one after them, or lines that were pasted. Raises
    EOFError at the end of input, and what input() raises.
    """
    lines = [console.input(prompt, markup=False), *_pasted()]
    if lines[0].lstrip().startswith('"""'):
        lines[0] = lines[0].lstrip()[3:]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(console.input(". ", markup=False))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(console.input(". ", markup=False))
    return "\n".join(lines)


def _pasted():
    """The lines that wait on stdin where it is no line editor that takes them.

    GNU readline gives a paste as one line with line breaks in it (see line_editor). Without it the lines of a paste are there at once,
    as nobody types that fast.
    """
    lines = []
    with contextlib.suppress(OSError, ValueError, EOFError):      # no such call for consoles of Windows
        while not _brackets_pastes() and select.select([sys.stdin], [], [], 0.02)[0]:
            lines.append(input())
    return lines


def _brackets_pastes():
    """Whether input() is edited by GNU readline, which needs a terminal."""
    readline = sys.modules.get("readline")
    return readline is not None and "libedit" not in (readline.__doc__ or "") and sys.stdout.isatty()


def line_editor():
    """Turn on line editing in input(), where Python has it.

    GNU readline then also tells pasted line breaks from the Enter key.
    """
    with contextlib.suppress(ImportError):
        import readline
        if _brackets_pastes():
            readline.parse_and_bind("set enable-bracketed-paste on")


def chat_loop(model, writer, messages, think):
    """Read a message and answer it, until /exit or the end of input."""
    from rich.console import Console
    line_editor()
    console, start = Console(stderr=True, highlight=False), list(messages)
    console.print(f"{visible(model.config.name)}, a context of {model.n_ctx} tokens; /help lists the commands", markup=False)
    while True:
        try:
            text = read_message(console)
            if text.strip() == "/exit":
                break
            if text.strip() == "/clear":
                messages = list(start)
            elif re.fullmatch(r"\s*/\w+\s*", text):
                wrong = "" if text.strip() == "/help" else f"there is no command {visible(text.strip())}\n"
                console.print(f"{wrong}{CHAT_HELP}", markup=False)
            elif text.strip():
                messages = answer(model, writer, [*messages, {"role": "user", "content": text}], think)
                while results := read_results(console, messages):
                    messages = answer(model, writer, [*messages, *results], think, len(results))
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print("\n/exit or Ctrl-D leaves")
        except UnicodeDecodeError:
            console.print("the line is not UTF-8 text")
    console.print("")


def read_results(console, messages):
    """Read the results of the calls in the last message, a list of messages.

    It is empty if there are no calls, or if the user gives no result for one.
    """
    results = []
    for call in messages[-1].get("tool_calls", ()) if messages else ():
        console.print(f"the result of {visible(call['function']['name'])}, or an empty line to go on without", markup=False)
        text = read_message(console, "= ")
        if not text.strip():
            return []
        results.append({"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": text})
    return results


def answer(model, writer, messages, think, n_new=1):
    """Stream the reply to the last n_new messages -> the messages that follow.

    They include the reply, also if it was stopped. A question that failed is removed, and so are results of calls.
    """
    from pydsa.chat import chat_prompt
    failed, writer.reply = False, None
    try:
        writer.write(chat_prompt(model.tokenizer, messages, thinking=think, tools=writer.restrictions.tools), think)
    except KeyboardInterrupt:
        click.echo("\n[stopped]", err=True)
    except ContextFullError as error:
        click.echo(f"\n{visible(str(error))} /clear starts a new conversation.", err=True)
        failed = writer.reply is None or not writer.reply.n_generated
    except PydsaError as error:
        click.echo(f"\n{visible(sentence(error))}", err=True)
        failed = True
    if failed or writer.reply is None:
        return messages[:-n_new]
    sys.stdout.write("\n")
    sys.stdout.flush()
    click.echo(writer.summary(), err=True)
    return [*messages, writer.reply.message]
