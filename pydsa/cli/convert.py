"""pydsa convert: a model of Hugging Face as a GGUF file."""
import click

from pydsa.cli.console import progress_bar
from pydsa.cli.types import FileName
from pydsa.cli.shared import kept
from pydsa.terminal import json_text, visible


@click.command()
@click.argument("folder", type=FileName())
@click.argument("out", type=FileName())
@click.option("--type", "--outtype", "kind", default="Q8_0", show_default=True, metavar="TYPE",
              help="F32, F16, BF16, Q8_0, or a mix of pydsa quantize that needs no imatrix, such as Q4_K_M.")
@click.option("--split-max-size", metavar="SIZE", help="Write parts of at most so many bytes of tensors, such as 40G (K, M, G, T).")
@click.option("--split-max-tensors", type=click.IntRange(1), metavar="N", help="Write parts of at most N tensors.")
@click.option("--dry-run", is_flag=True, help="Check everything but the weights, show the sizes, and write nothing.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the report.")
def convert(folder, out, kind, split_max_size, split_max_tensors, dry_run, force, output):
    """Convert a model of Hugging Face to a GGUF file.

    FOLDER has config.json, safetensors files and the tokenizer. No program in it is run, and pickle files are never opened. The file gets
    its name when it is complete; after an interruption the same command goes on where it stopped.
    """
    from pydsa.conversion import Conversion, format_plan, run
    from pydsa.conversion.checkpoint import ReadError
    from pydsa.conversion.types import check_type
    from pydsa.gguf.layout import parse_size
    kind, size = check_type(kind), parse_size(split_max_size) if split_max_size is not None else None
    conversion = Conversion(folder)
    layout = conversion.layout(out, kind, size, split_max_tensors)
    if output == "text":
        click.echo("\n".join(map(visible, format_plan(conversion.describe(layout, kind)))))
    try:
        with progress_bar("converting") as progress:
            report = run(conversion, layout, kind, force, dry_run,
                         lambda done, total, name: progress(done / 1e6, round(total / 1e6), f"MB {name}"))
    except (KeyboardInterrupt, ReadError):
        if layout.journal.exists():
            click.echo(f"\n{kept(out)}", err=True)
        raise
    if output == "json":
        click.echo(json_text(report))
        return
    for note in report["notes"][len(conversion.notes):]:
        click.echo(f"note: {visible(note)}")
    if report["resumed"]:
        click.echo(f"{report['resumed'] / 1e6:.1f} MB were there from an interrupted run")
    if not dry_run:
        click.echo(f"written: {visible(str(layout.parts[0].path))}")
