"""pydsa look: a page and pictures of what an answer attended to."""
import contextlib
import sys
import webbrowser
from pathlib import Path

import click

from pydsa import DEMO
from pydsa.cli.console import progress_bar, show
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument, options_of_what_is_so
from pydsa.cli.types import FileName
from pydsa.cli.shared import chat_options, check_chat_options, comma_numbers, engine_options, load_model, options_with_defaults
from pydsa.cli.shared import read_text, sampling_options, take_fields
from pydsa.errors import PydsaError
from pydsa.options import size
from pydsa.terminal import visible

NOTES = Path(DEMO).with_name("notes.txt")


@click.command()
@model_argument(DEMO)
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"), help="Read the prompt from a file; - is stdin.")
@click.option("-n", "--predict", "max_tokens", type=int, default=64, show_default=True,
              help="Tokens of the answer at most; -1: no limit; 0: look at the prompt alone.")
@click.option("-o", "--output", type=FileName(), default="look.html", show_default=True, help="The page to write.")
@click.option("--png", "folder", type=FileName(), help="A folder to draw pictures into.")
@click.option("--open", "opened", is_flag=True, help="Show the page in the browser.")
@click.option("--layers", help="Numbers of the layers to show, with commas between them.  [default: all]")
@click.option("--mass", is_flag=True, help="Also measure the share of dense attention that the chosen keys hold, which takes longer.")
@click.option("--recall", is_flag=True, help="Also measure how many of the keys chosen from float32 index keys the cached ones find, which "
                                             "runs the text once more.")
@click.option("--window", type=click.IntRange(1),
              help="Record so many tokens of the prompt, the last ones.  [default: as many as take a few minutes and 1 GB]")
@click.option("--recording", type=FileName(), help="Look at a saved recording of the model, without running it.")
@click.option("--answer", "n_answer", type=click.IntRange(1), help="With --recording: how many of its last tokens are the answer.")
@click.option("--stop", "-r", "--reverse-prompt", "stop", multiple=True, metavar="TEXT",
              help="End the answer where it has this text, without it. Can be repeated.")
@options_with_defaults(sampling_options, temperature=0.0)
@engine_options
@llama_cpp_options
@options_of_what_is_so
@chat_options
def look(model, prompt, file, output, folder, opened, layers, recording, n_answer, **settings):
    """Show what an answer attended to, as a page.

    The page has the text with each token shaded by how much the answer looked at it, in all layers or one; what each token looked at; and
    how choices change, and the use of experts. It is one file that needs nothing else. Without MODEL it runs the demo model, without a
    prompt too on its notes. The answer goes to stdout.
    """
    from pydsa.look import files
    if recording is not None and (prompt is not None or file is not None):
        raise click.UsageError("--recording is a run that was: leave out -p and -f, or leave out --recording.")
    if recording is not None and (settings["mass"] or settings["recall"]):
        raise click.UsageError("--mass and --recall are measured while a text runs: leave out --recording, or record with mass.")
    if n_answer is not None and recording is None:
        raise click.UsageError("--answer is for --recording.")
    if prompt is not None and file is not None:
        raise click.UsageError("Give the prompt with -p or with -f, not both.")
    layers = None if layers is None else comma_numbers("--layers", layers)
    files.check(output, ".html")
    draws = folder is not None and _can_draw(folder)
    if recording is not None:
        seen = _recorded(model, recording, n_answer, layers)
    else:
        seen = _answered(model, prompt, file, layers, **settings)
    seen.save(output)
    click.echo(f"{visible(output)}: {seen.figures.n_tokens} tokens, {size(Path(output).stat().st_size)}", err=True)
    for path in seen.pngs(folder) if draws else ():
        click.echo(visible(path), err=True)
    if opened and not webbrowser.open(Path(output).resolve().as_uri()):
        click.echo("there is no browser to open the page with", err=True)
    if folder is not None and not draws:
        raise click.exceptions.Exit(Failure.exit_code)


def _can_draw(folder):
    """Whether pictures can be drawn into a folder; why not goes to stderr."""
    from pydsa.drawing import figure_class
    from pydsa.look.pictures import check_folder
    check_folder(folder)
    try:
        figure_class()
    except PydsaError as error:
        click.echo(f"{error} The page is written all the same.", err=True)
        return False
    return True


def _answered(path, prompt, file, layers, max_tokens, stop, raw, special, system, think, mass, recall, window, threads,
              threads_batch, **settings):
    """Run the model -> the Look."""
    from pydsa.chat import thinking_note
    from pydsa.look.running import look_at, prompt_of
    from pydsa.sampling import Sampling
    from pydsa.text.answers import Stops
    check_chat_options(raw, special, system, think)
    Stops(stop)         # raises its error before the model is read
    sampling = Sampling(**take_fields(Sampling, settings))
    text = _text(path, prompt, file)
    engine = load_model(path, threads, threads_batch, **settings)
    sampling.check_vocabulary(engine.config.n_vocab)
    note = None if raw else thinking_note(engine.tokenizer, think)
    if note:
        click.echo(visible(note), err=True)
    with contextlib.ExitStack() as bar:
        progress = bar.enter_context(progress_bar("reading the prompt"))

        def answer(pieces):
            bar.close()
            show(pieces)
        seen = look_at(engine, prompt_of(engine, text, raw, special, system, think), None if max_tokens < 0 else max_tokens, sampling, stop,
                       layers, mass, window, None, answer, progress)
    click.echo("", err=True)
    if recall:
        _measure_recall(engine, seen)
    return seen


def _measure_recall(engine, seen):
    """Put the recall of the cached index keys into a Look.

    Where it cannot be measured, a sentence says so, and the page is written without it.
    """
    from pydsa.faithful import check
    try:
        with progress_bar("measuring recall") as progress:
            report = check(engine, seen.ids[:engine.n_ctx], progress=progress)
    except PydsaError as error:
        click.echo(f"{visible(str(error))} The page is written without recall.", err=True)
        return
    seen.figures.add_recall({row["layer"]: row["recall_of_cached_keys"] for row in report.layers})


def _text(path, prompt, file):
    """The text to look at: of -p, of -f, of a pipe, or the demo's notes."""
    if prompt is None and (file is not None or not sys.stdin.isatty()):
        prompt = read_text(file or sys.stdin)
        if not prompt and file is None and path == DEMO:
            prompt = None
    if prompt is None and path == DEMO:
        return NOTES.read_text(encoding="utf-8").removesuffix("\n")
    if not prompt:
        raise Failure("There is no text to look at: give it with -p, -f or a pipe.")
    return prompt


def _recorded(path, recording, n_answer, layers):
    """Open a recording -> the Look."""
    from pydsa import Recording, load_tokenizer
    from pydsa.look import look_at_recording
    return look_at_recording(Recording.open(recording), load_tokenizer(path), n_answer, layers)
