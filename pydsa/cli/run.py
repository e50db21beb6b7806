"""pydsa run: generate text, or chat."""
import contextlib
import sys

import click

from pydsa import DEMO
from pydsa.cli.shared import (chat_options, check_chat_options, engine_options, load_model, read_text, sampling_options, stage_options,
                              take_fields)
from pydsa.cli.console import Writer, chat_loop
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument, options_of_what_is_so
from pydsa.cli.types import FileName
from pydsa.cli.restrictions import read_restrictions, restriction_options
from pydsa.terminal import visible

RESTRICTIONS = ("json_schema", "json_schema_file", "grammar", "grammar_file", "tools")


@contextlib.contextmanager
def recorded(model, session, path):
    """A context in which a session's steps are recorded in a file.

    path: None to record nothing.
    """
    if path is None:
        yield
        return
    from pydsa.recordings.recorder import chooses
    with session.record(selection=chooses(model.setup), path=path) as recording:
        yield
    click.echo(f"recorded {recording.n} tokens in {visible(path)}", err=True)


@click.command()
@model_argument(DEMO)
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"), help="Read the prompt from a file; - is stdin.")
@click.option("-n", "--predict", "max_tokens", type=int, default=-1, show_default=True, help="Tokens to generate at most; -1: no limit.")
@click.option("--stop", "-r", "--reverse-prompt", "stop", multiple=True, metavar="TEXT",
              help="End the answer where it has this text, without it. Can be repeated.")
@restriction_options
@sampling_options
@engine_options
@stage_options
@llama_cpp_options
@click.option("-cnv/-no-cnv", "--conversation/--no-conversation", "conversation", default=None, hidden=True)
@options_of_what_is_so
@chat_options
@click.option("--record", type=FileName(), metavar="FILE", help="Write the keys that each token chose, and its experts, to a file (.npz).")
def run(model, prompt, file, max_tokens, stop, conversation, raw, special, system, think, record, threads, threads_batch,
        **settings):
    """Generate text, or chat.

    Without MODEL it runs the demo model, which finds codes in notes. With -p, -f or piped input, only the answer goes to stdout. On a
    terminal without them it starts a chat. Reasoning goes to stderr.
    """
    from pydsa.sampling import Sampling
    from pydsa.text.answers import Stops
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt with -p or with -f, not both.")
    raw = raw or conversation is False
    check_chat_options(raw, special, system, think)
    Stops(stop)         # raises its error before the model is read
    restrictions = read_restrictions(raw, **{name: settings.pop(name) for name in RESTRICTIONS})
    sampling = Sampling(**take_fields(Sampling, settings))
    chatting = prompt is None and file is None and sys.stdin.isatty()
    if chatting and raw:
        raise click.UsageError("--raw continues a text: give it with -p, -f or a pipe.")
    if record is not None and (settings["stages"] or settings["ray"]):
        raise click.UsageError("--record looks into the steps of this process: leave out --stages and --ray.")
    if conversation and (raw or not chatting):
        raise click.UsageError("-cnv chats on a terminal: leave out -p, -f, --raw and pipes, or leave out -cnv.")
    if not chatting and prompt is None:
        prompt = read_text(file or sys.stdin)
    if prompt is not None and not prompt and not raw:
        raise Failure("The prompt is empty.")
    engine = load_model(model, threads, threads_batch, **settings)
    sampling.check_vocabulary(engine.config.n_vocab)
    from pydsa.chat import Prompt, chat_prompt, thinking_note
    messages = [{"role": "system", "content": system}] if system else []
    writer = Writer(engine, sampling, None if max_tokens < 0 else max_tokens, stop, restrictions)
    note = None if raw else thinking_note(engine.tokenizer, think)
    if note:
        click.echo(visible(note), err=True)
    with recorded(engine, writer.session, record):
        if chatting:
            chat_loop(engine, writer, messages, think)
            return
        if raw:
            prompt = Prompt(engine.tokenize(prompt, parse_special=special))
            if not prompt.ids:
                raise Failure("The prompt is empty.")
        else:
            messages = [*messages, {"role": "user", "content": prompt}]
            prompt = chat_prompt(engine.tokenizer, messages, thinking=think, tools=restrictions.tools)
        unread = False
        try:
            writer.write(prompt, think)
        except OSError:         # stdout's
            unread = True
            raise
        finally:
            if writer.n_prompt and not unread:
                click.echo(f"\n{writer.summary()}", err=True)
