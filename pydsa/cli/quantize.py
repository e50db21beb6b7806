"""pydsa quantize: the tensors of a GGUF file in smaller types."""
import click

from pydsa.cli.console import progress_bar
from pydsa.cli.types import FileName
from pydsa.cli.shared import kept, override_option
from pydsa.terminal import visible

HIGH = "Q8_0 or better"


def _pairs(context, parameter, texts):
    """Values of --tensor-type, such as "ffn_down=Q6_K", as pairs."""
    pairs = [text.rpartition("=") for text in texts]
    for pattern, equals, kind in pairs:
        if not (pattern and equals and kind):
            raise click.UsageError(f"--tensor-type is {(pattern or kind)!r}, expected REGEX=TYPE, like ffn_down_exps=Q6_K.")
    return [(pattern, kind) for pattern, _, kind in pairs]


def _size(context, parameter, text):
    from pydsa.gguf.layout import parse_size
    return None if text is None else parse_size(text)


@click.command()
@click.argument("model", type=FileName(), metavar="IN.gguf")
@click.argument("output", type=FileName(), metavar="OUT.gguf")
@click.argument("kind", metavar="TYPE")
@click.option("--imatrix", type=FileName(), help="An imatrix, GGUF or .dat: which inputs matter (pydsa imatrix).")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=_pairs,
              help="The type of tensors whose names the pattern is found in. Repeat it; the first that fits counts.")
@click.option("--keep-indexer/--no-keep-indexer", default=True, show_default=True,
              help=f"Leave the indexers' matrices at {HIGH}: what sparse attention rests on.")
@click.option("--leave-output-tensor", is_flag=True, help="Leave output.weight as it is.")
@click.option("--output-tensor-type", metavar="TYPE", help="The type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="One type for all matrices, instead of the mix of TYPE.")
@click.option("--allow-requantize", is_flag=True, help="Also quantize what is stored in less than Q8_0 already, which loses more.")
@click.option("--split-max-size", metavar="N(M|G)", callback=_size, help="Split the output into parts of at most so many bytes.")
@override_option
@click.option("--dry-run", is_flag=True, help="Only show types and sizes.")
@click.option("--force", is_flag=True, help="Replace the output if it is there.")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads.  [default: physical cores]")
@click.option("-o", "--output", "form", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
def quantize(model, output, kind, form, override_kv, split_max_size, force, **options):
    """Quantize a GGUF file, as llama-quantize does.

    TYPE is one of llama-quantize's, such as Q4_K_M, Q6_K, IQ4_XS or MXFP4_MOE, or COPY. The table shows for each tensor the error of its
    new values, normalised (NMSE), and with --imatrix also weighted by it. Of a split model, name the first part.
    """
    from pydsa.bench import format_rows
    from pydsa.gguf.layout import journal_of
    from pydsa.quantization import quantize, summary
    try:
        with progress_bar("quantizing") as show:        # one bar, as older versions of rich show no second one
            report = quantize(model, output, kind, override_kv=override_kv, split_max_bytes=split_max_size, overwrite=force,
                              progress=lambda done, total, name: show(done / 1e6, round(total / 1e6), f"MB, {name}"),
                              compiling=lambda done, total, name: show(done, total, f"kernels compiled, {name}"), **options)
    except KeyboardInterrupt:
        if not options["dry_run"] and journal_of(output).exists():
            click.echo(f"\n{kept(output)}", err=True)
        raise
    if report.restarted:
        click.echo(report.restarted, err=True)
    if report.resumed:
        click.echo(f"{report.resumed / 1e6:.1f} MB were there from an interrupted run", err=True)
    click.echo(format_rows([_cells(row, options["imatrix"]) for row in report.rows], form), nl=False)
    for line in summary(report):
        click.echo(line, err=True)
    if report.without_data:
        click.echo(f"the imatrix has no data of {len(report.without_data)} of the quantized tensors, {report.without_data[0]} the first",
                   err=True)
    if report.wanting:
        click.echo(f"an imatrix is needed: {len(report.wanting)} tensors would be of no use without one, {report.wanting[0]} the first",
                   err=True)
    if report.refused:
        click.echo(f"would be refused: {visible(report.refused)}", err=True)
        return
    verb = "would write" if options["dry_run"] else "wrote"
    click.echo(f"{verb} {visible(', '.join(map(str, report.paths)))}", err=True)


def _cells(row, imatrix):
    """A row of the table."""
    cells = {"tensor": row.tensor, "shape": "x".join(map(str, reversed(row.shape))), "from": row.source, "to": row.type,
             "bytes before": row.bytes_in, "bytes after": row.bytes_out, "nmse": row.nmse}
    return cells | ({"weighted nmse": row.weighted} if imatrix else {})
