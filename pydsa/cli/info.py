"""pydsa info: what a file holds and needs."""
import os

import click
from click.core import ParameterSource

from pydsa.check import check_files, format_check
from pydsa.cli.shared import attention_option, ctx_option, device_option, model_options, reproducible_option
from pydsa.console import progress_bar
from pydsa.gguf_file import open_gguf
from pydsa.habits import llama_cpp_options, model_argument
from pydsa.terminal import json_text, visible


@click.command()
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
    there are any. Of a folder of Hugging Face it shows what `pydsa convert` would give, and what each type would take.
    """
    if os.path.isdir(os.path.expanduser(model)):
        given = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        return _show_folder(os.path.expanduser(model), output, given, settings)
    if check:
        with progress_bar("reading") as progress:
            report = check_files(open_gguf(os.path.expanduser(model)), progress)
        click.echo(json_text(report) if output == "json" else "\n".join(map(visible, format_check(report))))
        ctx.exit(0 if report["sound"] else 1)
    from pydsa.setup import Setup
    from pydsa.report import describe, format_report
    if settings["n_ctx"] == 0:
        settings["n_ctx"] = Setup(model, **settings | {"n_ctx": None}).config.n_ctx_train
    report = describe(Setup(model, **settings))
    click.echo(json_text(report) if output == "json" else format_report(report), nl=output == "json")


def _show_folder(folder, output, given, settings):
    """Show what converting a folder would give.

    given: the names of the options on the command line.
    """
    idle = sorted(set(given) - {"model", "output", "n_ctx", "kv_type", "index_type"})
    if idle:
        raise click.UsageError(f"{folder} is a folder of Hugging Face, of which `info` takes -c, --kv-type, --index-type and -o only, not "
                               f"--{idle[0].replace('_', '-')}.")
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
