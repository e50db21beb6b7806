"""The command line, which parses options and prints.

Only generated text, tables and reports go to stdout.
"""
import dataclasses
import functools
import os
import sys

import click

from pydsa import DEMO, __version__
from pydsa.check import check_files, format_check
from pydsa.console import Writer, chat_loop, progress_bar
from pydsa.exits import Commands, Failure
from pydsa.gguf_file import open_gguf
from pydsa.habits import llama_cpp_options, logit_biases, model_argument, options_of_what_is_so
from pydsa.override import parse_overrides
from pydsa.quants import CACHE_ALIASES, CACHE_TYPES
from pydsa.restrictions import read_restrictions, restriction_options
from pydsa.terminal import json_text, visible


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main():
    """Run models with DeepSeek Sparse Attention from GGUF files.

    \b
    pydsa run                                     chat with the demo model
    pydsa run model.gguf                          chat
    pydsa run model.gguf -p "Why is the sky blue?"
    pydsa run model.gguf -f notes.txt --raw -n 64   continue a text
    pydsa serve model.gguf                        an HTTP server, and a page to chat on
    pydsa bench model.gguf -d 0,4096              speed, also deep in a context
    pydsa info model.gguf                         what the file is and needs
    """


def options(*decorators):
    """One decorator for several options, in the order given."""
    def apply(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return apply


cache_types = click.Choice([*CACHE_TYPES, *CACHE_ALIASES])
ctx_option = click.option("-c", "--ctx-size", "n_ctx", type=int,
                          help="Tokens of context; 0: the model's limit, or what fits in memory.  [default: 8192, or the model's limit]")
model_options = options(
    click.option("-ub", "--ubatch-size", "n_ubatch", type=int, default=2048, show_default=True,
                 help="Prompt tokens that run together. More tokens read the weights less often, and use more memory."),
    click.option("--kv-type", type=cache_types, default="i16", show_default=True,
                 help="Type of the cached latents; i16 and i8 (alias q8_0): integers, two scales a row."),
    click.option("--index-type", type=cache_types,
                 help="Type of the indexer's cached keys.  [default: i8; f32 if --kv-type is]"),
    click.option("--dsa-top-k", type=int, help="Number of keys that a token attends to.  [default: the model's]"),
    click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", callback=lambda ctx, option, texts: parse_overrides(texts),
                 help="Replace or add a value of the file's metadata; TYPE: int, float, bool, str. Repeat it, or put commas between."))
device_option = click.option("--device", type=click.Choice(["cpu", "cuda", "reference"]), default="cpu", show_default=True,
                             help="cuda: an NVIDIA GPU; reference: plain numpy, slow and exact.")
attention_option = click.option("--attention", type=click.Choice(["auto", "sparse", "masked", "dense"]), default="auto", show_default=True,
                                help="auto: dense up to top_k tokens, sparse beyond.")
reproducible_option = click.option(
    "--reproducible", is_flag=True,
    help="Give a token the same logits, bit for bit, whatever steps it runs in: threads, -ub, reused prefixes, other conversations.")
threads_options = options(
    click.option("-t", "--threads", type=int, help="CPU threads for generation.  [default: physical cores]"),
    click.option("-tb", "--threads-batch", type=int, help="CPU threads for prompts.  [default: as -t]"))
sampling_options = options(
    click.option("--temp", "temperature", type=float, default=0.8, show_default=True, help="Temperature; 0: greedy."),
    click.option("--top-k", type=int, default=40, show_default=True, help="Sample from the K likeliest tokens; 0: all."),
    click.option("--top-p", type=float, default=0.95, show_default=True, help="Sample from the likeliest tokens that sum to P."),
    click.option("--min-p", type=float, default=0.05, show_default=True, help="Drop tokens less likely than P times the likeliest."),
    click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="Penalty for tokens among the last 64; 1: none."),
    click.option("--logit-bias", metavar="ID(+|-)BIAS", multiple=True, callback=logit_biases,
                 help="Add to the logit of a token, like 15043+1; 15043-inf: never pick it. Can be repeated."),
    click.option("-s", "--seed", type=int, callback=lambda context, parameter, seed: None if seed == -1 else seed,
                 help="Seed of the random numbers; -1: a new one.  [default: -1]"))


def options_with_defaults(decorator, **defaults):
    """A decorator of options, some of which have other defaults."""
    def decorate(function):
        function = decorator(function)
        for option in function.__click_params__:
            option.default = defaults.get(option.name, option.default)
        return function
    return decorate


RESTRICTIONS = ("json_schema", "json_schema_file", "grammar", "grammar_file", "tools")


def take_fields(kind, settings):
    """Take the options out of settings that are fields of a dataclass."""
    return {field.name: settings.pop(field.name) for field in dataclasses.fields(kind) if field.name in settings}


def load_model(path, threads=None, threads_batch=None, **settings):
    """Load a model, with progress on stderr."""
    click.echo(f"loading {visible(path)}", err=True)
    if settings.get("n_ctx") == 0:
        settings["n_ctx"] = longest_context(path, settings)
    with progress_bar("compiling kernels") as progress:
        from pydsa.model import load
        model = load(path, threads=threads, threads_batch=threads_batch, progress=progress, **settings)
    if model.n_ctx > model.config.n_ctx_train:
        click.echo(f"the context of {model.n_ctx} tokens is longer than the model's own, {model.config.n_ctx_train}", err=True)
    return model


def longest_context(path, settings):
    """The tokens of -c 0, with a sentence on stderr if memory is short."""
    from pydsa.fit import longest_context
    n_ctx, whole = longest_context(path, **{key: value for key, value in settings.items() if key != "n_ctx"})
    click.echo(f"a context of {n_ctx} tokens, " + ("the model's own" if whole else "as many as the memory holds"), err=True)
    return n_ctx


@main.command()
@model_argument(DEMO)
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"), help="Read the prompt from a file; - is stdin.")
@click.option("-n", "--predict", "max_tokens", type=int, default=-1, show_default=True, help="Tokens to generate at most; -1: no limit.")
@click.option("--stop", "-r", "--reverse-prompt", "stop", multiple=True, metavar="TEXT",
              help="End the answer where it has this text, without it. Can be repeated.")
@restriction_options
@sampling_options
@threads_options
@ctx_option
@model_options
@attention_option
@reproducible_option
@device_option
@llama_cpp_options
@click.option("-cnv/-no-cnv", "--conversation/--no-conversation", "conversation", default=None, hidden=True)
@options_of_what_is_so
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat format.")
@click.option("--special", is_flag=True, help="Encode the texts of control tokens in a --raw prompt as these tokens.")
@click.option("--system", "-sys", "--system-prompt", "system", help="A system message for the chat format.")
@click.option("--think", is_flag=True, help="Let the model reason before it answers, if it can.")
def run(model, prompt, file, max_tokens, stop, conversation, raw, special, system, think, threads, threads_batch, **settings):
    """Generate text, or chat.

    Without MODEL it runs the demo model, which finds codes in notes. With -p, -f or piped input, only the answer goes to stdout. On a
    terminal without them it starts a chat. Reasoning goes to stderr.
    """
    from pydsa.answers import Stops
    from pydsa.sampling import Sampling
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt with -p or with -f, not both.")
    raw = raw or conversation is False
    if raw and (system or think):
        raise click.UsageError("--system and --think belong to the chat format, which --raw leaves out.")
    if special and not raw:
        raise click.UsageError("--special is for --raw prompts.")
    Stops(stop)         # raises its error before the model is read
    restrictions = read_restrictions(raw, **{name: settings.pop(name) for name in RESTRICTIONS})
    sampling = Sampling(**take_fields(Sampling, settings))
    chatting = prompt is None and file is None and sys.stdin.isatty()
    if chatting and raw:
        raise click.UsageError("--raw continues a text: give it with -p, -f or a pipe.")
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
    if chatting:
        chat_loop(engine, writer, messages, think)
        return
    if raw:
        prompt = Prompt(engine.tokenize(prompt, parse_special=special))
        if not prompt.ids:
            raise Failure("The prompt is empty.")
    else:
        prompt = chat_prompt(engine.tokenizer, [*messages, {"role": "user", "content": prompt}], thinking=think, tools=restrictions.tools)
    unread = False
    try:
        writer.write(prompt, think)
    except OSError:         # stdout's
        unread = True
        raise
    finally:
        if writer.n_prompt and not unread:
            click.echo(f"\n{writer.summary()}", err=True)


def read_text(file):
    """The text of a file or pipe.

    Left out are a byte order mark, with which programs of Windows begin a file, and the newline at the end.
    """
    from pydsa.tokenizer import MAX_TEXT
    try:
        text = file.read(MAX_TEXT + 1)      # not all of a file without end, such as /dev/zero
    except UnicodeDecodeError as error:
        raise Failure(f"The prompt is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise Failure(f"The prompt cannot be read from {file.name} ({error.strerror or error}); give it with -p.") from error
    if len(text) > MAX_TEXT:
        raise Failure(f"The prompt has more than {MAX_TEXT} characters, expected at most so many.")
    return text.removeprefix("\ufeff").removesuffix("\n")


@main.command()
@model_argument(DEMO)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all of this machine's.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen at; 0: a free one.")
@click.option("--api-key", multiple=True, envvar="PYDSA_API_KEY", metavar="KEY",
              help="A key that requests must have. Can be repeated, or set in PYDSA_API_KEY.")
@click.option("--api-key-file", type=click.Path(), help="A file with more keys, one a line.")
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN",
              help="An origin, like https://example.org, whose pages may use the server; *: all. Can be repeated.")
@click.option("--allowed-host", "allowed_hosts", multiple=True, metavar="NAME",
              help="A name, beside --host and this machine's own, by which clients call the server. Can be repeated.")
@click.option("--alias", "-a", help="Name of the model in answers.  [default: that of its file]")
@click.option("--parallel", "-np", "n_parallel", type=click.IntRange(1), default=1, show_default=True,
              help="Answers that run at the same time, each with a context of its own.")
@click.option("--queue", "n_queue", type=click.IntRange(0), default=64, show_default=True,
              help="Requests that may wait beside them; more are refused with 429.")
@click.option("--cache-ram", type=click.IntRange(0), default=8192, show_default=True, metavar="MIB",
              help="Memory for conversations that may go on, in MiB; 0: only those in slots.")
@click.option("--slot-save-path", "slot_folder", type=click.Path(file_okay=False), metavar="DIR",
              help="A folder for saved slots, and for conversations beyond --cache-ram.")
@click.option("--timeout", "-to", type=click.FloatRange(0.1, 86400), default=60, show_default=True,
              help="Seconds for a client to send a request, and to read; and for answers that run when the server is stopped.")
@click.option("-n", "--predict", "max_tokens", type=int, default=-1, show_default=True,
              help="Tokens to generate at most, for requests that do not say; -1: no limit.")
@options_with_defaults(sampling_options, temperature=1.0, top_p=1.0)
@threads_options
@ctx_option
@model_options
@attention_option
@reproducible_option
@device_option
@functools.partial(llama_cpp_options, but=("-np", "--parallel"))
@options_of_what_is_so
@click.option("--think", "thinking", is_flag=True, help="Let the model reason first, if it can, for requests that do not say.")
@click.option("--chat-template-file", type=click.File("r", encoding="utf-8"), help="A jinja2 template instead of the model's.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Form of the lines on requests, on stderr.")
def serve(model, api_key, api_key_file, cache_ram, max_tokens, chat_template_file, output, threads, threads_batch, **settings):
    """Answer OpenAI's and Anthropic's APIs over HTTP.

    Without MODEL it serves the demo model. A page to chat on is at http://127.0.0.1:8080. SIGTERM and Ctrl-C let answers finish. Needs
    pip install 'pydsa[serve]'.
    """
    from pydsa.sampling import Sampling
    try:
        from pydsa.server import running
        from pydsa.server.settings import Settings, read_keys
    except ModuleNotFoundError as error:
        raise Failure(f"The server needs {error.name}, which is not installed: pip install 'pydsa[serve]'.") from error
    settings["sampling"] = Sampling(**take_fields(Sampling, settings))
    ours = Settings(**take_fields(Settings, settings),
                    keys=read_keys(api_key, api_key_file), cache_bytes=cache_ram << 20, max_tokens=None if max_tokens < 0 else max_tokens,
                    template=chat_template_file and chat_template_file.read(), json_log=output == "json")
    running.serve(ours, functools.partial(load_model, model, threads, threads_batch, **settings))


@main.command()
@model_argument(DEMO)
@llama_cpp_options
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Prompt lengths to time, e.g. 128,512; 0: none.")
@click.option("-n", "--n-gen", default="128", show_default=True, help="Numbers of tokens to generate; 0: none.")
@click.option("-d", "--n-depth", default="0", show_default=True, help="Tokens already in the context, e.g. 0,4096.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Number of times that each test runs.")
@threads_options
@model_options
@device_option
@reproducible_option
@click.option("--attention", default="auto", show_default=True, help="One or more of auto, sparse, masked, dense, e.g. sparse,masked.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
@click.option("--plot", type=click.Path(), help="Also draw speed against depth into this file: .png, .svg or .pdf. Needs matplotlib.")
@click.option("--ops", is_flag=True, help="Show instead the time of each op of one step, and the limit of the machine.")
def bench(model, n_prompt, n_gen, n_depth, repetitions, threads, threads_batch, output, ops, plot, attention, **settings):
    """Time prompts (pp) and generation (tg), as llama-bench does.

    Without MODEL it times the demo model. For generation it also shows the bytes that a token must read, and the speed at which this uses
    all of the memory's bandwidth.
    """
    from pydsa.bench import Bench, format_rows
    from pydsa.model import ATTENTION
    from pydsa.options import choose
    from pydsa.plot import check_plot, save_plot
    if plot is not None and ops:
        raise click.UsageError("--plot draws the speed at each depth, which --ops does not time.")
    if plot is not None:
        check_plot(plot)
    tests = Bench(comma_numbers("-p", n_prompt), comma_numbers("-n", n_gen), comma_numbers("-d", n_depth), repetitions)
    modes = [choose("attention", mode.strip(), ATTENTION) for mode in attention.split(",")]      # all, before the first is timed
    rows = []
    for mode in modes:
        engine = load_model(model, threads, threads_batch, n_ctx=tests.n_ctx, attention=mode, **settings)
        with progress_bar("timing") as progress:
            for row in tests.ops(engine, progress) if ops else tests.run(engine, progress):
                rows.append(row)
                if output == "jsonl":
                    click.echo(format_rows([row], output), nl=False)
    if output != "jsonl":
        click.echo(format_rows(rows, output), nl=False)
    if plot is not None:
        save_plot(rows, plot)
        click.echo(f"wrote {plot}", err=True)


def comma_numbers(name, text):
    """The integers of an option, with commas between them, as a list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{name} is {text!r}, expected integers with commas between them.") from None
    if min(numbers) < 0:
        raise click.UsageError(f"{name} has the number {min(numbers)}, expected numbers from 0 on.")
    return numbers


@main.command()
@model_argument()
@llama_cpp_options
@ctx_option
@model_options
@attention_option
@reproducible_option
@device_option
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the report.")
@click.option("--check", is_flag=True, help="Read everything once instead: look for damage, and show the SHA-256 of each file.")
@click.pass_context
def info(ctx, model, output, check, **settings):
    """Show what a file holds, what it needs, and how each layer will run.

    No weights are read, but with --check: it names the tensors with NaN, infinities or stretches of zeros, and ends with exit code 1 if
    there are any.
    """
    if check:
        with progress_bar("reading") as progress:
            report = check_files(open_gguf(os.path.expanduser(model)), progress)
        click.echo(json_text(report) if output == "json" else "\n".join(map(visible, format_check(report))))
        ctx.exit(0 if report["sound"] else 1)
    from pydsa.model import Setup
    from pydsa.report import describe, format_report
    if settings["n_ctx"] == 0:
        settings["n_ctx"] = Setup(model, **settings | {"n_ctx": None}).config.n_ctx_train
    report = describe(Setup(model, **settings))
    click.echo(json_text(report) if output == "json" else format_report(report), nl=output == "json")


@main.command()
@model_argument()
@llama_cpp_options
@click.option("-p", "--prompt", required=True, help="The text to run.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
@threads_options
@ctx_option
@model_options
@attention_option
def trace(model, prompt, output, threads, threads_batch, **settings):
    """Compare every intermediate value with the numpy reference.

    There is a row for each op, in the order they run. The last column is the normalised squared error, sum (a - b)^2 / sum b^2; for indices
    it is the share that differs.
    """
    from pydsa.bench import format_rows
    from pydsa.report import compare_nodes
    engine = load_model(model, threads, threads_batch, **settings)
    reference = load_model(model, device="reference", **settings | {"n_ctx": engine.n_ctx})
    rows = compare_nodes(engine, reference, engine.tokenize(prompt))
    click.echo(format_rows(rows, output), nl=False)
