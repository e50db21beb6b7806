"""pydsa bench: time prompts and generation."""
import click

from pydsa import DEMO
from pydsa.cli.shared import (comma_numbers, load_model, model_options, placement_options, reproducible_option, stage_options,
                              threads_options)
from pydsa.cli.console import progress_bar
from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.types import FileName


@click.command()
@model_argument(DEMO)
@llama_cpp_options
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Prompt lengths to time, e.g. 128,512; 0: none.")
@click.option("-n", "--n-gen", default="128", show_default=True, help="Numbers of tokens to generate; 0: none.")
@click.option("-d", "--n-depth", default="0", show_default=True, help="Tokens already in the context, e.g. 0,4096.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Number of times that each test runs.")
@threads_options
@model_options
@placement_options
@stage_options
@reproducible_option
@click.option("--attention", default="auto", show_default=True, help="One or more of auto, sparse, masked, dense, e.g. sparse,masked.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
@click.option("--plot", type=FileName(),
              help="Also draw speed against depth, and the share and the ceiling of each op, into this file: .png, .svg or .pdf. "
                   "With --ops: the ops alone. Needs matplotlib.")
@click.option("--ops", is_flag=True, help="Show instead the time of each op of one step, and the limit of the machine.")
def bench(model, n_prompt, n_gen, n_depth, repetitions, threads, threads_batch, output, ops, plot, attention, **settings):
    """Time prompts (pp) and generation (tg), as llama-bench does.

    Without MODEL it times the demo model. For generation it also shows the bytes that a token must read, and the speed at which this uses
    all of the memory's bandwidth.
    """
    from pydsa.bench import Bench, about, format_rows
    from pydsa.cli.plot import check_plot, save_plot
    from pydsa.options import choose
    from pydsa.setup import ATTENTION
    if (ops or plot is not None) and (settings["stages"] or settings["ray"]):
        raise click.UsageError(f"{'--ops' if ops else '--plot'} times the ops of a step in this process: leave out --stages and --ray.")
    if plot is not None:
        check_plot(plot)
    tests = Bench(comma_numbers("-p", n_prompt), comma_numbers("-n", n_gen), comma_numbers("-d", n_depth), repetitions)
    modes = [choose("attention", mode.strip(), ATTENTION) for mode in attention.split(",")]      # all, before the first is timed
    rows, op_rows = [], None if plot is None else []
    for mode in modes:
        engine = None       # the memory of the one before
        engine = load_model(model, threads, threads_batch, n_ctx=tests.n_ctx, attention=mode, **settings)
        with progress_bar("timing") as progress:
            for row in tests.ops(engine, progress) if ops else tests.run(engine, progress, op_rows):
                rows.append(row)
                if output == "jsonl":
                    click.echo(format_rows([row], output), nl=False)
    if output != "jsonl":
        click.echo(format_rows(rows, output), nl=False)
    if plot is not None:
        speeds, parts = ([], rows) if ops else (rows, op_rows)
        save_plot(plot, about(engine), speeds, parts)
        click.echo(f"wrote {plot}", err=True)
