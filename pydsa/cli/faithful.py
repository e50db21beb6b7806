"""pydsa faithful: whether sparse attention is right."""
import click

from pydsa import DEMO
from pydsa.cli.console import progress_bar
from pydsa.cli.exits import Failure
from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.types import FileName
from pydsa.cli.shared import load_model, model_options, options_with_defaults, placement_options, read_text, threads_options
from pydsa.terminal import json_text, visible


@click.command()
@model_argument(DEMO)
@click.option("-p", "--prompt", help="The text to run.")
@click.option("-f", "--file", type=click.File("r", encoding="utf-8"),
              help="Read the text from a file; - is stdin.  [default: the demo's notes]")
@click.option("-l", "--length", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of the text to run at most.")
@click.option("--samples", type=click.IntRange(32), default=256, show_default=True,
              help="Tokens at which each layer is compared with the definition.")
@click.option("--reference", "n_reference", type=click.IntRange(0), metavar="TOKENS",
              help="Tokens that the numpy reference runs too, which is slow.  [default: three times top_k, for small models]")
@click.option("--against", type=FileName(), metavar="FILE",
              help="Compare with another implementation's choice of keys, or its logits (.npz, .npy).")
@click.option("--save", type=FileName(dir_okay=False), metavar="FILE",
              help="Write the choices of keys and experts of this run, a recording (.npz).")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form of the report.")
@threads_options
@options_with_defaults(model_options, n_ubatch=512)
@placement_options
@llama_cpp_options
@click.pass_context
def faithful(ctx, model, prompt, file, length, samples, n_reference, against, save, output, threads, threads_batch, **settings):
    """Tell whether a model's sparse attention is right.

    A text runs with the keys that the indexer chooses. Each layer is compared with the published definition, with dense attention and with
    the reference, and the report says in words what deviates and what that usually means. Ends with exit code 1 if something is wrong.
    """
    from pydsa.faithful import check, check_possible, read, reference_tokens, text_ids
    from pydsa.faithful.verdicts import in_words
    from pydsa.fitting import fitted
    if prompt is not None and file is not None:
        raise click.UsageError("Give the text with -p or with -f, not both.")
    theirs = None if against is None else read(against)
    text = prompt if file is None else read_text(file)
    ids = text_ids(model, text, theirs, length)
    if not ids:
        raise Failure("The text is empty.")
    check_possible(fitted(model, n_ctx=len(ids), **settings), len(ids))
    engine = load_model(model, threads, threads_batch, n_ctx=len(ids), **settings)
    n_reference = reference_tokens(engine, len(ids)) if n_reference is None else min(n_reference, len(ids))
    exact = None
    if n_reference:
        same = {key: settings[key] for key in ("dsa_top_k", "override_kv")}
        exact = load_model(model, device="reference", n_ctx=n_reference, kv_type="f32", **same)
    with progress_bar("comparing") as progress:
        report = check(engine, ids, samples, theirs, exact, save, progress)
    click.echo(json_text(report.as_dict(), indent=1) if output == "json" else visible(in_words(report), keep="\n"), nl=output == "json")
    if save is not None:
        click.echo(f"wrote {visible(save)}", err=True)
    ctx.exit(0 if report.faithful else 1)
