"""How many of the keys that exact scores choose are also chosen from a cache of another type, layer by layer.

    python tools/recall.py model.gguf --kv-type q8_0 -f text.txt

"same inputs": queries, weights and keys are those of one run with exact caches, and only the keys are stored in the other type.
"whole run": a run whose caches are all of that type, whose later layers therefore see other inputs.
"""
import json

import click
import numpy as np

import pydsa
from pydsa.backends import cpu, reference
from pydsa.bench import markdown, random_ids
from pydsa.model import ModelPlan
from pydsa.quants import KV_TYPES, cache_storage


def recalls(found, exact, top_k):
    """The share of each token's exact keys that were found, both int32 [T, k], for the tokens that have more than top_k keys."""
    beyond = np.flatnonzero(np.arange(len(exact)) >= top_k)
    return np.array([np.isin(exact[t], found[t]).mean() for t in beyond])


def run(model, ids):
    """The last thing that each node of the indexer wrote, by name: its queries and keys are rotated in place."""
    seen = {}

    def observe(node, written):
        if node.name.startswith("indexer_") and written:
            seen[node.name] = written[0].copy()
    model.session().prefill(ids, observe=observe)
    return seen


def choose(backend, seen, layer, storage, top_k):
    """The keys that a backend chooses from a cache of this storage, with the inputs of one layer."""
    q, w, keys = (seen[f"indexer_{name}-{layer}"].astype(backend.FLOAT) for name in ("q", "weights", "k"))
    keys, n_head = keys.reshape(len(keys), -1), w.shape[-1]
    cache = backend.cache_rows(len(keys), keys.shape[1], storage)
    backend.cache_write(cache, keys, np.arange(len(keys)))
    out = np.empty((len(keys), top_k), np.int32)
    backend.indexer_select(out, q.reshape(len(q), n_head, -1), w, cache, np.arange(len(keys)), 1.0)
    return out


def compare(path, ids, kv_type, dsa_top_k=None, threads=None):
    """{layer: (recalls with the same inputs, recalls of the whole run)}, an array of a number for each token beyond top_k."""
    def load(kv_type):
        return pydsa.load(path, n_ctx=len(ids), n_ubatch=len(ids), attention="sparse", kv_type=kv_type, dsa_top_k=dsa_top_k,
                          threads=threads)

    model = load("f32")
    exact, whole = run(model, ids), run(load(kv_type), ids)
    result, storage = {}, cache_storage(kv_type, "index_keys")
    for name in (name for name in exact if name.startswith("indexer_top_k-")):
        layer = int(name.split("-")[1])
        same = choose(cpu, exact, layer, storage, model.top_k), choose(reference, exact, layer, "f32", model.top_k)
        result[layer] = recalls(*same, model.top_k), recalls(whole[name], exact[name], model.top_k)
    return result


def table(result):
    """Rows: for each layer, and for all, the mean and the worst token of both."""
    everything = {**result, "all": tuple(np.concatenate(parts) for parts in zip(*result.values()))}
    rows = []
    for layer, (same, whole) in everything.items():
        rows.append({"layer": str(layer), "same inputs": f"{same.mean():.4f}", "same inputs, worst token": f"{same.min():.4f}",
                     "whole run": f"{whole.mean():.4f}", "whole run, worst token": f"{whole.min():.4f}"})
    return rows


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False))
@click.option("--kv-type", type=click.Choice(list(KV_TYPES)), default="q8_0", show_default=True, help="type of the caches to judge")
@click.option("-p", "--prompt", help="text to run on  [random tokens]")
@click.option("-f", "--file", type=click.File(encoding="utf-8"), help="file that holds the text")
@click.option("-l", "--length", type=click.IntRange(2), default=2048, show_default=True, help="tokens to use at most")
@click.option("--dsa-top-k", type=click.IntRange(1), help="keys each token attends to  [the model's]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads to use")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="form of the table")
def main(model, kv_type, prompt, file, length, dsa_top_k, threads, output):
    try:
        planned = ModelPlan(model, dsa_top_k=dsa_top_k)
        if planned.top_k is None:
            raise click.UsageError(f"{model} has no indexer whose choice could be compared.")
        if file is not None or prompt is not None:
            ids = pydsa.load_tokenizer(model).encode(prompt if file is None else file.read(), add_bos=True)[:length]
        else:
            ids = random_ids(planned, length)
        if len(ids) <= planned.top_k:
            raise click.UsageError(f"The text has {len(ids)} tokens; the indexer only chooses beyond {planned.top_k}. "
                                   "Give a longer one (-f, -l), or a smaller --dsa-top-k.")
        rows = table(compare(model, ids, kv_type, dsa_top_k, threads))
    except pydsa.PydsaError as error:
        raise click.UsageError(str(error)) from error
    click.echo(json.dumps(rows, indent=1) if output == "json" else markdown(rows))


if __name__ == "__main__":
    main()
