"""pydsa trace: compare every intermediate value with the reference."""
import click

from pydsa.cli.habits import llama_cpp_options, model_argument
from pydsa.cli.shared import attention_option, ctx_option, load_model, model_options, placement_options, threads_options

SAME = ("n_ubatch", "kv_type", "index_type", "dsa_top_k", "override_kv", "attention")       # not where the model is, nor its weights


@click.command()
@model_argument()
@llama_cpp_options
@click.option("-p", "--prompt", required=True, help="The text to run.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Form of the table.")
@threads_options
@ctx_option
@model_options
@attention_option
@placement_options
def trace(model, prompt, output, threads, threads_batch, **settings):
    """Compare every intermediate value with the numpy reference.

    There is a row for each op, in the order they run. The last column is the normalised squared error, sum (a - b)^2 / sum b^2; for indices
    it is the share that differs. It is inf, and null in JSON, where values are NaN, or infinite on one side only.
    """
    from pydsa.bench import format_rows
    from pydsa.cli.report import compare_nodes
    engine = load_model(model, threads, threads_batch, **settings)
    same = {key: settings[key] for key in SAME}
    reference = load_model(model, device="reference", n_ctx=engine.n_ctx, **same)
    rows = compare_nodes(engine, reference, engine.tokenize(prompt))
    click.echo(format_rows(rows, output), nl=False)
