"""pydsa imatrix: which inputs of a model's matrices are large, for quantizers."""
import contextlib
import os

import click

from pydsa import DEMO
from pydsa.cli.console import progress_bar
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.types import FileName
from pydsa.cli.shared import load_model, model_options, placement_options, read_text, threads_options
from pydsa.terminal import visible


def _paths(values):
    """The paths that are given in one value or several, with commas between."""
    return [path for value in values for path in ([value] if os.path.exists(value) else value.split(","))]


@click.command()
@model_argument("")
@llama_cpp_options
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"), help="The text to run, in chunks; - is stdin.")
@click.option("-o", "--output-file", "--output", "output", type=FileName(), default="imatrix.gguf", show_default=True,
              help="The file to write.")
@click.option("--output-format", "form", type=click.Choice(["gguf", "dat"]), help="dat: llama.cpp's older form.  [default: gguf]")
@click.option("--in-file", "in_files", type=FileName(), multiple=True, metavar="FILES",
              callback=lambda context, option, given: _paths(given),
              help="Imatrix files, with commas between, to add to that of the text; without a text only these are added up.")
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=int, default=-1, show_default=True, help="Chunks to run at most; -1: all.")
@click.option("--chunk", "--from-chunk", "first", type=click.IntRange(0), default=0, show_default=True, help="Chunks to leave out first.")
@click.option("--output-frequency", "-ofreq", "every", type=click.IntRange(1), default=10, show_default=True, metavar="N",
              help="Write the file after each N chunks, and at the end.")
@click.option("--save-frequency", "copy_every", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Keep a copy, FILE.at_CHUNKS, after each N chunks; 0: none.")
@click.option("--process-output", is_flag=True, help="Also collect for the output matrix.")
@click.option("--parse-special", is_flag=True, help="Encode the texts of control tokens as these tokens.")
@click.option("--ppl/--no-ppl", "ppl", default=True, help="Also measure the perplexity of the text.  [default: --ppl]")
@click.option("--show-statistics", is_flag=True, help="Show figures of the tensors of the one --in-file instead, and of layers.")
@click.option("--table", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True, help="Form of the table.")
@threads_options
@model_options
@placement_options
def imatrix(model, file, output, form, in_files, n_ctx, chunks, first, every, copy_every, process_output, parse_special, ppl,
            show_statistics, table, threads, threads_batch, **settings):
    """Write an importance matrix from a text, as llama-imatrix does.

    The table shows how many tokens reached each layer's experts, and which matrices have no data. Without MODEL the demo model runs the
    text. Ctrl-C ends the run with what is complete.
    """
    from pydsa.imatrix import check_target, coverage, read_all, save
    if show_statistics:
        return _show_statistics(file, in_files, n_ctx, table)
    if file is None and not in_files:
        raise click.UsageError("There is nothing to do: give a text with -f, or files to add up with --in-file.")
    if chunks == 0 or chunks < -1:
        raise click.UsageError(f"--chunks is {chunks}, expected a number from 1 on, or -1 for all.")
    text = None if file is None else read_text(file, "text", "")
    if text == "":
        raise Failure(f"The text is empty, expected one chunk of {n_ctx} tokens at least (-c).")
    path, settings = model or (DEMO if text is not None else None), settings | {"n_ctx": n_ctx}
    inputs, tensors, found = [] if file is None else [file.name], None, read_all(in_files, n_ctx)
    if path is not None:
        from pydsa.fitting import fitted
        setup = fitted(path, **settings)
        inputs, tensors = [*inputs, *setup.file.paths], {tensor.name: tensor for tensor in setup.trunk}
        if found is not None:
            found.check_model(tensors, path)
    check_target(output, inputs)
    if form is None and not output.endswith(".gguf"):
        click.echo(f"{visible(output)} will be a GGUF file; --output-format dat writes the older form", err=True)
    if text is None:
        save(found, output, form or "gguf")
    else:
        attention = "dense" if setup.config.top_k is None else "sparse"
        engine = load_model(path, threads, threads_batch, attention=attention, **settings)
        found = _collect(engine, engine.tokenize(text, parse_special=parse_special), output, found, ppl, form=form or "gguf", every=every,
                         copy_every=copy_every, first=first, n_chunks=None if chunks < 0 else chunks, process_output=process_output,
                         dataset=file.name)
    rows = coverage(found, tensors)
    click.echo(f"wrote {visible(output)}: {len(found.sums)} tensors, {found.chunks} chunks of {n_ctx} tokens", err=True)
    _print(rows, table)


def _print(rows, table):
    """Print a table; one without rows is nothing in markdown."""
    from pydsa.bench import format_rows
    if rows or table != "md":
        click.echo(format_rows(rows, table), nl=False)


def _show_statistics(file, in_files, n_ctx, table):
    """Print the figures of one file, in markdown also those of its layers."""
    from pydsa.imatrix import layer_statistics, read, statistics
    if file is not None or len(in_files) != 1:
        raise click.UsageError("--show-statistics is for one imatrix: name it with --in-file, without -f.")
    found = read(in_files[0], n_ctx)
    click.echo(f"{len(found.sums)} tensors, {found.chunks} chunks of {found.chunk_size} tokens of {visible(', '.join(found.datasets))}",
               err=True)
    _print(statistics(found), table)
    if table == "md":
        click.echo()
        _print(layer_statistics(found), table)


def _collect(engine, ids, output, before, ppl, **options):
    """Run the text, with progress on stderr -> the Imatrix of all of it."""
    from pydsa.imatrix import Scores, collect_to_file
    from pydsa.quality.distributions import Threads
    done = 0
    try:
        with progress_bar("running") as progress, Threads() as threads:
            scores = Scores(threads)
            run = collect_to_file(engine, ids, output, before=before, score=scores if ppl else None,
                                  progress=lambda done, total: progress(done, total, str(scores)), **options)
            with contextlib.closing(run):
                for found in run:
                    done += 1
    except KeyboardInterrupt:
        if done:
            click.echo(f"\n{visible(output)} has {done} chunks of the text; to go on: --in-file {visible(output)} "
                       f"--from-chunk {options['first'] + done}", err=True)
        raise
    if str(scores):
        click.echo(scores, err=True)
    return found if before is None else before.merged(found)
