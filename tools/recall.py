"""Recall of the indexer's choice when index keys have another type.

    python tools/recall.py model.gguf --index-type i8
    python tools/recall.py model.gguf -f chapter.txt -l 4096 --dsa-top-k 512 -o json

Recall is the share of the keys chosen from float32 index keys that are also chosen from keys of the other type.

"same inputs": queries, weights and keys come from the run with float32 caches. Only the keys that scores are computed from are of the other
type, so each layer stands for itself. "whole run": the other run's own choices, where the losses of earlier layers add up.

Only positions that have more than top_k keys count, as the others choose all they have. "16 together": how many keys sixteen neighbouring
tokens choose together, in multiples of top_k: 1 if all choose the same, 16 if no two do.
"""

import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.quants import CACHE_TYPES  # noqa: E402

UBATCH = 512        # tokens of a step, whose choices are kept until it is compared
TOGETHER = 16       # neighbouring tokens whose keys are united


class Probe:
    """An observer of a session with float32 caches.

    It records what the indexers choose, and what they would choose from caches that hold the same keys in the other type.
    """

    def __init__(self, backend, session, caches):
        self.backend, self.session = backend, session
        self.caches = {ref: cache.rows for ref, cache in caches.items() if ref.kind == "index_keys"}
        self.values, self.exact, self.again = {}, {}, {}

    def __call__(self, node, arrays):
        if arrays:
            self.values[node.name] = arrays[0]      # rotations work in place: the last value written counts
        if node.op == "cache_write" and node.args[0] in self.caches:
            keys = self.values[node.name]
            self.backend.cache_write(self.caches[node.args[0]], keys.reshape(len(keys), -1), self.positions(keys))
        elif node.op == "indexer_select":
            layer, found = node.args[3].layer, np.empty_like(arrays[0])
            self.choose(found, node)
            self.exact[layer], self.again[layer] = arrays[0].copy(), found

    def choose(self, found, node):
        """Choose a layer's keys from the other cache."""
        _, q, weights, keys, _, scale = node.args
        q, weights = self.values[q.name], self.values[weights.name]
        self.backend.indexer_select(found, q, weights, self.caches[keys], self.positions(q), scale)

    def positions(self, rows):
        """The positions of the rows of the present step."""
        return np.arange(self.session.n_past, self.session.n_past + len(rows))


def hits(found, exact, n_keys):
    """How many of each token's exact keys were found.

    Choices are [T, k], padded with -1.
    """
    both = []
    for chosen in (found, exact):
        mask = np.zeros((len(chosen), n_keys + 1), bool)
        np.put_along_axis(mask, chosen, True, axis=1)       # -1 selects the last column
        both.append(mask[:, :n_keys])
    return (both[0] & both[1]).sum(axis=1)


def united(chosen, n_keys):
    """The number of keys that TOGETHER neighbouring tokens choose.

    One number for each such group of choices [T, k] without -1.
    """
    counts = []
    for first in range(0, len(chosen) - TOGETHER + 1, TOGETHER):
        mask = np.zeros(n_keys, bool)
        mask[chosen[first:first + TOGETHER]] = True
        counts.append(mask.sum())
    return counts


def recall(path, ids, index_type, dsa_top_k=None, threads=None):
    """Shares of found keys of each layer.

        {layer: {"same inputs": shares, "whole run": shares, "16 together": multiples of top_k}}

    There is one share for each position that has more than top_k keys, and one multiple for sixteen of them.
    """
    import pydsa

    def load(index_type):
        return pydsa.load(path, n_ctx=len(ids), n_ubatch=UBATCH, kv_type="f32", index_type=index_type, dsa_top_k=dsa_top_k, threads=threads)

    model, other = load("f32"), load(index_type)
    if model.top_k is None:
        raise pydsa.PydsaError(f"{path}: {model.config.architecture} has no indexer, so there is no choice of keys to compare.")
    if len(ids) <= model.top_k:
        raise pydsa.PydsaError(f"With {len(ids)} tokens and a top_k of {model.top_k} every key is chosen; give a longer text, a greater "
                               "--length, or a smaller --dsa-top-k.")
    session, whole, shares = model.session(), other.session(), {}
    probe = Probe(model.backend, session, other.setup.make_caches(other.backend, len(ids)))
    for start in range(0, len(ids), UBATCH):
        ubatch, chosen = ids[start:start + UBATCH], {}

        def watch(node, arrays):
            if node.op == "indexer_select":
                chosen[node.args[3].layer] = arrays[0].copy()

        session.prefill(ubatch, observe=probe)
        whole.prefill(ubatch, observe=watch)
        first = max(model.top_k - start, 0)
        for layer, exact in probe.exact.items() if first < len(ubatch) else ():
            of_layer = shares.setdefault(layer, {"same inputs": [], "whole run": [], f"{TOGETHER} together": []})
            of_layer[f"{TOGETHER} together"].extend(np.array(united(exact[first:], len(ids))) / model.top_k)
            for name, found in (("same inputs", probe.again), ("whole run", chosen)):
                of_layer[name].extend(hits(found[layer][first:], exact[first:], len(ids)) / model.top_k)
    return {layer: {name: np.array(values) for name, values in both.items()} for layer, both in shares.items()}


def rows(shares, top_k):
    """A row for each layer, then one for all.

    It has the keys that were lost, the mean and the worst token.
    """
    names = ("same inputs", "whole run")
    every = {name: np.concatenate([both[name] for both in shares.values()]) for name in (*names, f"{TOGETHER} together")}
    for layer, both in [*shares.items(), ("all", every)]:
        row = {"layer": layer, "keys": both[names[0]].size * top_k}
        for name in names:
            values = both[name]
            row |= {f"{name}: lost": round(float((1 - values).sum() * top_k)), f"{name}: mean": float(values.mean()),
                    f"{name}: worst token": float(values.min())}
        unions = both[f"{TOGETHER} together"]
        row[f"{TOGETHER} together"] = float(unions.mean()) if unions.size else None
        yield row


def for_people(row):
    """The cells of a row as text.

    They have enough digits to tell 1 from almost 1.
    """
    return {key: f"{value:.6f}" if isinstance(value, float) else "-" if value is None else str(value) for key, value in row.items()}


def fail(message):
    click.echo(message, err=True)
    sys.exit(2)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model_path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option("-p", "--prompt", help="text to run  [a page of Python's documentation]")
@click.option("-f", "--file", type=click.File(encoding="utf-8"), help="file that holds the text")
@click.option("-l", "--length", type=click.IntRange(1), default=4096, help="tokens of the text to use at most  [4096]")
@click.option("--index-type", type=click.Choice(list(CACHE_TYPES)), default="i8", help="type of the cached index keys  [i8]")
@click.option("--dsa-top-k", type=click.IntRange(1), help="keys that each token attends to  [the model's]")
@click.option("-t", "--threads", type=click.IntRange(1), help="threads to use")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="form of the table  [md]")
def main(model_path, prompt, file, length, index_type, dsa_top_k, threads, output):
    from pydoc_data.topics import topics

    import pydsa
    from pydsa.bench import format_rows, markdown
    from pydsa.model import Setup

    if prompt is not None and file is not None:
        fail("Give the text with -p or with -f, not both.")
    try:
        text = file.read() if file else topics["import"] if prompt is None else prompt
        ids = list(pydsa.load_tokenizer(model_path).encode(text, add_bos=True))[:length]
        shares = recall(model_path, ids, index_type, dsa_top_k, threads)
        table = list(rows(shares, dsa_top_k or Setup(model_path).top_k))
    except UnicodeDecodeError:
        fail(f"{file.name}: this is not UTF-8 text.")
    except pydsa.PydsaError as error:
        fail(str(error))
    if output != "md":
        click.echo(format_rows(table, output), nl=False)
        return
    click.echo(f"{markdown([for_people(row) for row in table])}\n{index_type} index keys beside f32, {len(ids)} tokens.")


if __name__ == "__main__":
    main()
