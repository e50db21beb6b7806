"""The terminal: progress bars, streamed answers and the chat loop."""
import contextlib
import io
import re
import sys
import time

import click

from pydsa.errors import ContextFullError, PydsaError
from pydsa.terminal import harmless, visible

CHAT_HELP = "/help  this list\n/clear  forget the conversation\n/exit  leave (also Ctrl-D)\nCtrl-C  stop a reply"


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
    """Streams the answers of one session to stdout.

    A terminal gets what would control it in a form that shows it; a pipe or a file gets every byte. It keeps the text and the figures of
    the last answer for summary().
    """

    def __init__(self, model, sampling, max_tokens):
        self.model, self.sampling, self.max_tokens = model, sampling, max_tokens
        self.session = model.session()
        self.n_prompt = self.n_generated = 0

    def write(self, ids):
        """Generate the answer to a context of token ids, and write it.

        The prefix that the session has already is not run again. `text` becomes the text that was written.
        """
        self.text, self.n_prompt, self.n_generated = "", 0, 0
        self.prompt_seconds = self.seconds = 0.0
        start, n_reused = time.perf_counter(), self.session.reuse(ids)
        shown = harmless if sys.stdout.isatty() else str
        with progress_bar("reading the prompt") as progress:
            logits = self.session.prefill(ids[n_reused:], progress)
        self.n_prompt, self.prompt_seconds = len(ids) - n_reused, time.perf_counter() - start

        def timed(tokens):
            for token in tokens:
                self.n_generated += 1
                self.seconds = time.perf_counter() - start - self.prompt_seconds
                yield token

        for piece in self.model.decode_stream(timed(self.session.sample(logits, self.max_tokens, self.sampling))):
            self.text += piece
            sys.stdout.write(shown(piece))
            sys.stdout.flush()

    def summary(self):
        """One line: speeds, time to the first token, the attention in use."""
        from pydsa.report import attention_in_words

        def speed(n, seconds):
            return f"{n / seconds:.1f} t/s" if n > 0 and seconds > 0 else "- t/s"
        return (f"prompt {self.n_prompt} tokens, {speed(self.n_prompt, self.prompt_seconds)}; "
                f"generation {self.n_generated} tokens, {speed(self.n_generated - 1, self.seconds)}; "
                f"first token after {self.prompt_seconds:.2f} s; attention {attention_in_words(self.model.setup)}")


def chat_loop(model, writer, messages, think):
    """Read a line and answer it, until /exit or the end of input."""
    from rich.console import Console
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    console, start = Console(stderr=True, highlight=False), list(messages)
    console.print(f"{visible(model.config.name)}, a context of {model.n_ctx} tokens; /help lists the commands", markup=False)
    while True:
        try:
            line = console.input("> ", markup=False)
        except EOFError:
            break
        except KeyboardInterrupt:
            console.print("\n/exit or Ctrl-D leaves")
            continue
        except UnicodeDecodeError:
            console.print("the line is not UTF-8 text")
            continue
        if line.strip() == "/exit":
            break
        if line.strip() == "/clear":
            messages = list(start)
        elif re.fullmatch(r"\s*/\w+\s*", line):
            wrong = "" if line.strip() == "/help" else f"there is no command {visible(line.strip())}\n"
            console.print(f"{wrong}{CHAT_HELP}", markup=False)
        elif line.strip():
            messages = answer(model, writer, [*messages, {"role": "user", "content": line}], think)
    console.print("")


def answer(model, writer, messages, think):
    """Stream the reply to the last message -> the messages that follow.

    They include the reply, also if it was stopped. A question that failed is removed.
    """
    from pydsa.chat import encode_chat
    failed = False
    try:
        writer.write(encode_chat(model.tokenizer, messages, thinking=think))
    except KeyboardInterrupt:
        click.echo("\n[stopped]", err=True)
    except ContextFullError as error:
        click.echo(f"\n{visible(str(error))} /clear starts a new conversation.", err=True)
        failed = not writer.text
    except PydsaError as error:
        click.echo(f"\n{visible(str(error))}", err=True)
        failed = True
    if failed:
        return messages[:-1]
    sys.stdout.write("\n")
    click.echo(writer.summary(), err=True)
    return [*messages, {"role": "assistant", "content": writer.text}]
