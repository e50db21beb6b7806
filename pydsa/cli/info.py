"""pydsa info: what a file holds and needs."""
import os

import click
from click.core import ParameterSource

from pydsa.cli.console import progress_bar
from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.nodes import GIVEN_WITH, check_given, forecast_of, node_options
from pydsa.cli.shared import attention_option, ctx_option, model_options, placement_options, reproducible_option
from pydsa.gguf.check import check_files, format_check
from pydsa.gguf.file import open_gguf
from pydsa.terminal import json_text, visible

LEAST_GPU = 1 << 20     # bytes: a smaller one lacks its unit


@click.command()
@model_argument()
@llama_cpp_options
@ctx_option
@model_options
@attention_option
@reproducible_option
@placement_options
@click.option("--gpu-memory", multiple=True, metavar="SIZE[,...]",
              help="Show the plan for GPUs of these sizes instead of this machine's, like 24GiB or 24GiB,48GiB.")
@click.option("--bandwidth", metavar="CPU,GPU",
              help="What the CPU and a GPU read of their memory, in GB/s, for the speed that a plan allows; with --stages: what nodes "
                   "read, a number or one for each.  [default: 100,1000]")
@node_options
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the report.")
@click.option("--check", is_flag=True, help="Read everything once instead: look for damage, and show the SHA-256 of each file.")
@click.pass_context
def info(ctx, model, output, check, gpu_memory, bandwidth, stages, **settings):
    """Show what a file holds, what it needs, and how each layer will run.

    No weights are read, but with --check: it names the tensors with NaN, infinities or stretches of zeros, and ends with exit code 1 if
    there are any. Of a folder of Hugging Face it shows what `pydsa convert` would give, and what each type would take; of one with
    some parts of a split model, which are missing, and which layers a stage can run with the others. With --stages it shows what the
    model takes and gives on several nodes, which need not be there.
    """
    given = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if os.path.isdir(os.path.expanduser(model)):
        return _show_folder(os.path.expanduser(model), output, given, settings)
    check_given(given, stages)
    of_nodes = {name: settings.pop(name) for name in GIVEN_WITH}
    if stages is not None:
        return _show_stages(*forecast_of(model, stages, bandwidth, settings, **of_nodes), output)
    if check:
        with progress_bar("reading") as progress:
            report = check_files(open_gguf(os.path.expanduser(model)), progress)
        click.echo(json_text(report) if output == "json" else "\n".join(map(visible, format_check(report))))
        ctx.exit(0 if report["sound"] else 1)
    from pydsa.cli.report import describe, format_report
    from pydsa.fitting import fitted, longest_context
    bandwidths, gpus = _bandwidths(bandwidth), _gpus(gpu_memory)
    if settings["n_ctx"] == 0:
        rest = {name: value for name, value in settings.items() if name != "n_ctx"}
        settings["n_ctx"] = longest_context(model, gpus=gpus, **rest)[0] if gpus else fitted(model, **rest).config.n_ctx_train
    setup = fitted(model, gpus=gpus, **settings)
    if gpus:
        _check_gpus(setup, gpus)
    if bandwidths and setup.plan is None:
        raise click.UsageError("--bandwidth is for plans of several devices or GPUs: give --gpu-memory, or leave it out.")
    report = describe(setup, bandwidths, here=not gpus)
    click.echo(json_text(report) if output == "json" else format_report(report), nl=output == "json")


def _show_stages(setup, forecast, output):
    """Show a Setup, and the forecast of it in stages."""
    from pydsa.cli.report import describe, format_report
    report = describe(setup, forecast=forecast)
    click.echo(json_text(report) if output == "json" else format_report(report), nl=output == "json")


def _gpus(texts):
    """GPUs of the sizes in --gpu-memory, by name; None without any."""
    from pydsa.backends.devices import simulated_gpus
    from pydsa.options import size_in_bytes
    sizes = {part: size_in_bytes("gpu_memory", part) for part in ",".join(texts).split(",")} if texts else {}
    without_unit = next((part for part, n in sizes.items() if n < LEAST_GPU), None)
    if without_unit is not None:
        raise click.UsageError(f"--gpu-memory has {without_unit}, which is {sizes[without_unit]} bytes: give a unit, as in 24GiB.")
    return simulated_gpus([sizes[part] for part in ",".join(texts).split(",")]) if texts else None


def _check_gpus(setup, gpus):
    """Raise UsageError if a plan has no GPU, or one that was not given."""
    if setup.plan is None:
        raise click.UsageError("--gpu-memory is for plans with GPUs: leave it out, or what keeps all on the CPU.")
    from pydsa.backends.devices import device_of
    unknown = [name for name in setup.placement.devices if device_of(name).reserved and name not in gpus]
    if unknown:
        raise click.UsageError(f"--gpu-memory has sizes for {', '.join(gpus)}, but not for {', '.join(unknown)}: give one for each GPU.")


def _bandwidths(text):
    """Bytes per second of the CPU and of a GPU; None if not given."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != 2 or not all(0 < one < float("inf") for one in found):
        raise click.UsageError(f"--bandwidth is {text!r}, expected two numbers of GB/s, like 100,1000.")
    return tuple(one * 1e9 for one in found)


def _show_folder(folder, output, given, settings):
    """Show what converting a folder would give, or which parts it has.

    given: the names of the options on the command line.
    """
    from pydsa.cli.parts_report import describe_parts, find_parts, format_parts
    if not os.path.exists(os.path.join(folder, "config.json")) and find_parts(folder):
        _refuse_options(f"{folder} is a folder with parts of a model, of which `info` takes -o only", given, {"model", "output"})
        reports = describe_parts(folder)
        click.echo(json_text(reports) if output == "json" else format_parts(reports), nl=output == "json")
        return
    _refuse_options(f"{folder} is a folder of Hugging Face, of which `info` takes -c, --kv-type, --index-type and -o only", given,
                    {"model", "output", "n_ctx", "kv_type", "index_type"})
    from pydsa.conversion import Conversion, format_memory, format_plan
    conversion = Conversion(folder)
    n_ctx = conversion.config.n_ctx_train if settings["n_ctx"] == 0 else settings["n_ctx"]
    memory = conversion.memory(n_ctx, settings["kv_type"], settings["index_type"])
    plan = conversion.describe(conversion.layout("model.gguf", "BF16"), "BF16")
    del plan["parts"]
    if output == "json":
        click.echo(json_text(plan | {"memory": memory}))
    else:
        click.echo("\n".join(map(visible, [*format_plan(plan), *format_memory(memory)])))


def _refuse_options(why, given, taken):
    """Raise UsageError for an option that was given, but is not taken."""
    idle = sorted(set(given) - taken)
    if idle:
        raise click.UsageError(f"{why}, not --{idle[0].replace('_', '-')}.")
