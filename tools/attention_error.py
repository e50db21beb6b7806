"""The error of sparse attention for each type of cache.

    python tools/attention_error.py --heads 128 --keys 2048

The output is compared with exact float64 under the same indices, and with float64 from the same rounded rows: the difference is the cache's
own rounding. Queries and rows are random; rotated values are ten times as large as compressed ones. "logits" is the standard deviation of
the scores. The larger it is, the sharper is the softmax, and the more an error in a score counts.
"""
import sys
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pydsa.quants import CACHE_TYPES  # noqa: E402

KV_LORA, N_ROT = 512, 64


def attend(backend, q, rows, indices, scale, storage):
    """A backend's sparse attention [T, H, KV_LORA] to rows that it stores."""
    cache = backend.cache_rows(len(rows), (KV_LORA, N_ROT), storage)
    backend.cache_write(cache, rows.astype(backend.FLOAT), np.arange(len(rows)))
    out = np.empty((*q.shape[:2], KV_LORA), backend.FLOAT)
    backend.sparse_attention(out, q.astype(backend.FLOAT), cache, indices, scale)
    return out


def nmse(a, b):
    """Normalised squared error: sum (a - b)^2 / sum b^2."""
    return float(((a - b) ** 2).sum() / (b ** 2).sum())


def errors(heads, keys, spread, tokens=4, seed=0):
    """Yield a row for each type of cache.

    It has the NMSE of the output against exact float64, and against float64 from the same rounded rows.
    """
    from pydsa.backends import cpu, reference
    rng, n_kv = np.random.default_rng(seed), 4 * keys
    q, rows = rng.standard_normal((tokens, heads, KV_LORA + N_ROT)), rng.standard_normal((n_kv, KV_LORA + N_ROT)).astype(np.float32)
    rows[:, KV_LORA:] *= 10
    q[..., KV_LORA:] /= 10
    indices = np.sort(rng.permuted(np.tile(np.arange(n_kv, dtype=np.int32), (tokens, 1)), axis=1)[:, :keys], axis=1)
    case = q.astype(np.float32), rows, indices, spread / np.sqrt(KV_LORA + N_ROT)
    exact = attend(reference, *case, "f32")
    for name in CACHE_TYPES:
        met = attend(cpu, *case, name)
        yield {"cache": name, "heads": heads, "keys": keys, "logits": spread, "NMSE": nmse(met, exact),
               "NMSE from the same rows": nmse(met, attend(reference, *case, name))}


@click.command(help=__doc__.split("\n")[0])
@click.option("--heads", type=click.IntRange(1), default=128, help="heads  [128]")
@click.option("--keys", type=click.IntRange(1), default=2048, help="keys that each token attends to  [2048]")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", help="form of the table  [md]")
def main(heads, keys, output):
    from pydsa.bench import format_rows
    click.echo(format_rows([row for spread in (1.0, 4.0) for row in errors(heads, keys, spread)], output), nl=False)


if __name__ == "__main__":
    main()
