"""How commands end: each mistake with one sentence and an exit code.

0: done. 1: `info --check` found a fault. 2: an error, in one sentence on stderr. 130: Ctrl-C; 141: nobody reads the output any more.
"""
import contextlib
import errno
import io
import os
import sys
import warnings

import click

from pydsa.cli.console import use_utf8
from pydsa.errors import LESS, PydsaError, sentence
from pydsa.signals import STOPPED, OutputError, interrupted
from pydsa.terminal import visible

UNREAD = 141        # what a shell says of a program that SIGPIPE has ended


class Failure(click.ClickException):
    """A mistake of the user: one sentence, exit code 2."""
    exit_code = 2

    def __init__(self, message):
        super().__init__(visible(message))


def _of_output(error):
    """Whether stdout could not be written."""
    return isinstance(error, OutputError) or os.name == "nt" and error.filename is None and not interrupted(error)


def _leave_output():
    """Let Python not try again, at its end, to write what is left."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextlib.contextmanager
def in_a_sentence():
    """A context whose errors end the command with a sentence."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except PydsaError as error:
        raise Failure(sentence(error)) from error
    except KeyboardInterrupt as error:
        click.echo("\n[stopped]", err=True)
        raise click.exceptions.Exit(STOPPED) from error
    except MemoryError as error:
        raise Failure(f"There is not enough memory, or less is allowed than is free (ulimit -v); {LESS}.") from error
    except OSError as error:
        if not _of_output(error):
            raise
        _leave_output()
        if error.errno == errno.EPIPE or os.name == "nt" and error.errno == errno.EINVAL:
            raise click.exceptions.Exit(UNREAD) from error
        raise Failure(f"The output cannot be written ({error.strerror}); send stdout elsewhere.") from error


@contextlib.contextmanager
def warnings_in_a_line():
    """A context in which a warning is a line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: click.echo(f"warning: {visible(str(message))}", err=True)
        yield


class Commands(click.Group):
    """The group of commands, which shows errors as one sentence."""

    def main(self, *args, standalone_mode=True, **options):
        """Run a command and exit; without standalone_mode return, or raise."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            with warnings_in_a_line():
                if sys.stdout is None:
                    raise Failure("There is no output: stdout is closed, expected a terminal, a file or a pipe.")
                use_utf8()
                code = super().main(*args, standalone_mode=False, **options)
        except click.ClickException as error:
            error.message = visible(error.message)      # names of files, such as a shell's * gives them
            error.show()
            code = error.exit_code
        except BaseException as error:
            if not interrupted(error):
                raise
            click.echo("\n[stopped]", err=True)
            code = STOPPED
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args, **options):
        """Parse the command line, where --help is shown."""
        with in_a_sentence():
            return super().make_context(*args, **options)

    def invoke(self, ctx):
        """Run the command."""
        with in_a_sentence():
            return super().invoke(ctx)
