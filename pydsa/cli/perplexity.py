"""pydsa perplexity: how well a model predicts a text, under several settings."""
import contextlib
import itertools
import math
import os
import time

import click

from pydsa import DEMO
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.types import FileName
from pydsa.cli.shared import comma_numbers, load_model, override_option, placement_options, read_text, reproducible_option
from pydsa.cli.shared import residence_options, threads_options, ubatch_option
from pydsa.quants import CACHE_ALIASES, CACHE_TYPES
from pydsa.signals import STOPPED
from pydsa.terminal import visible


@click.command()
@model_argument(DEMO)
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"), help="Read the text from a file; - is stdin.")
@click.option("-c", "--ctx-size", "n_ctx", type=int, help="Tokens of a chunk; the second half is scored.  [default: 512, or the base's]")
@click.option("--chunks", type=int, default=-1, show_default=True, help="Chunks to run at most; -1: all.")
@click.option("--ppl-stride", "stride", type=click.IntRange(0), default=0, show_default=True,
              help="Instead of chunks, windows of -c tokens every N; the last N are scored. 0: chunks.")
@click.option("--kl-divergence-base", "--save-all-logits", "base", metavar="FILE", type=FileName(),
              help="Write the log-probabilities of all tokens, in llama.cpp's form; with --kl-divergence, read them.")
@click.option("--top-logits", type=click.IntRange(1), metavar="N", help="Write those of the N likeliest tokens only, in pydsa's own form.")
@click.option("--kl-divergence", is_flag=True, help="Compare every row with the file of --kl-divergence-base.")
@click.option("--attention", default="auto", show_default=True, help="One or more of auto, sparse, masked, dense, e.g. dense,sparse.")
@click.option("--dsa-top-k", help="One or more numbers of keys that a token attends to, e.g. 512,1024.  [default: the model's]")
@click.option("--kv-type", default="i16", show_default=True, help="One or more types of the cached latents, e.g. f32,i16,i8.")
@click.option("--index-type", help="One or more types of the indexer's cached keys.  [default: i8; f32 if --kv-type is]")
@threads_options
@ubatch_option
@residence_options
@override_option
@placement_options
@reproducible_option
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
@llama_cpp_options
def perplexity(model, file, n_ctx, chunks, stride, base, top_logits, kl_divergence, output, **settings):
    """Measure the perplexity of a text, as llama-perplexity does.

    Without MODEL it measures the demo model. There is a row for each combination of --attention, --dsa-top-k, --kv-type and --index-type;
    all run side by side, and are compared with the first row, or with the file of --kl-divergence. The estimates so far go to stderr.
    Ctrl-C ends the run with the table of what is complete.
    """
    _check_options(file, n_ctx, chunks, stride, base, top_logits, kl_divergence)
    text = None if file is None else read_text(file, "text", "")
    if text == "":
        raise Failure("The text is empty, expected one of at least two chunks (-c).")
    from pydsa.quality import DEFAULT_N_CTX, Measurement
    from pydsa.quality.logits_file import open_logits
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(open_logits(base)) if kl_divergence else None
        length = n_ctx or (DEFAULT_N_CTX if reader is None else reader.n_ctx)
        rows = _combinations(settings)
        engines = [load_model(model, n_ctx=length, n_models=len(rows) - i, **one) for i, one in enumerate(rows)]
        measurement = Measurement(engines, text, n_ctx, None if chunks < 0 else chunks, stride or None, reader)
        if reader is not None and reader.incomplete_of:
            click.echo(f"{visible(base)} has {reader.n_chunks} of its {reader.incomplete_of} chunks: the run that wrote it ended early.",
                       err=True)
        save = base if reader is None else None
        stopped = _run(measurement, save, top_logits)
    _show(measurement.results, output)
    if save is not None:
        name = visible(save)
        click.echo(f"wrote {name}" if measurement.kept else f"{name} is not written: llama.cpp's form needs all chunks.", err=True)
    if stopped:
        click.echo(f"[stopped after {measurement.results[0].n_chunks} of {len(measurement.chunks)} chunks]", err=True)
        raise click.exceptions.Exit(STOPPED)


def _check_options(file, n_ctx, chunks, stride, base, top_logits, kl_divergence):
    """Refuse what does not go together, before a model is read."""
    if file is None and not kl_divergence:
        raise click.UsageError("There is no text: give it with -f, or -f - for stdin.")
    if n_ctx is not None and n_ctx < 3:
        raise click.UsageError(f"-c is {n_ctx}, expected at least 3 tokens of a chunk.")
    if chunks == 0 or chunks < -1:
        raise click.UsageError(f"--chunks is {chunks}, expected a number from 1 on, or -1 for all.")
    if kl_divergence and base is None:
        raise click.UsageError("--kl-divergence compares with a file: name it with --kl-divergence-base.")
    if base is not None and not kl_divergence and os.path.exists(base):
        raise click.UsageError(f"{visible(base)} is there already: add --kl-divergence to compare with it, or remove it to write it "
                               "anew.")
    if top_logits is not None and (base is None or kl_divergence):
        raise click.UsageError("--top-logits is for a file that is written: name it with --kl-divergence-base, without --kl-divergence.")
    if stride and base is not None:
        raise click.UsageError("--ppl-stride has no --kl-divergence-base: files of log-probabilities are of chunks.")


def _combinations(settings):
    """The options of each row, all different: {name: value} as load_model takes them."""
    from pydsa.options import choose
    from pydsa.setup import ATTENTION

    def several(name, choices):
        text = settings.pop(name)
        chosen = [None] if text is None else [choose(name, part.strip(), choices) for part in text.split(",")]
        return [CACHE_ALIASES.get(part, part) for part in chosen]
    caches = (*CACHE_TYPES, *CACHE_ALIASES)
    top_k = settings.pop("dsa_top_k")
    lists = (several("attention", ATTENTION), [None] if top_k is None else comma_numbers("--dsa-top-k", top_k),
             several("kv_type", caches), several("index_type", caches))
    rows = {}
    for attention, keys, kv_type, index_type in itertools.product(*lists):
        chosen = () if attention == "dense" else (keys, index_type)     # dense attention has the same result for all of them
        rows.setdefault((attention, *chosen, kv_type), dict(attention=attention, dsa_top_k=keys, kv_type=kv_type, index_type=index_type))
    return [row | settings for row in rows.values()]


def _run(measurement, save, n_top):
    """Run all chunks -> whether Ctrl-C ended the run.

    The estimates go to stderr. Before the first chunk is complete, Ctrl-C is an error as elsewhere.
    """
    n_chunks, start = len(measurement.chunks), time.monotonic()
    click.echo(f"{n_chunks} chunks of {measurement.n_ctx} tokens", err=True)
    if measurement.note is not None:
        click.echo(measurement.note, err=True)
    try:
        with contextlib.closing(measurement.run(save, n_top)) as run:
            for done in run:
                seconds = (time.monotonic() - start) * n_chunks
                if done == 1 and seconds > 60:
                    click.echo(f"{seconds / n_chunks:.1f} seconds a chunk, about {seconds / 60:.0f} minutes for all", err=True)
                click.echo(f"[{done}]{' '.join(f'{result.ppl:.4f}' for result in measurement.results)},", nl=False, err=True)
    except KeyboardInterrupt:
        if not measurement.results[0].n_chunks:
            raise
        return True
    finally:
        click.echo(err=True)
    return False


def _show(results, output):
    """Print the table in the form that is asked for."""
    from pydsa.bench import format_rows
    from pydsa.quality.perplexities import table
    rows = [result.row() for result in results]
    if output != "md":      # JSON has no infinity
        rows = [{name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
                for row in rows]
    click.echo(visible(table(rows), keep="\n") if output == "md" else format_rows(rows, output), nl=False)
