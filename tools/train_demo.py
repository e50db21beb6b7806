"""Train the demo model from scratch and write it as a GGUF file.

    python tools/train_demo.py                          # resumes from demo-run/, writes pydsa/demo/demo.gguf
    python tools/train_demo.py --folder run2 --seed 1 -o other.gguf

It takes about three quarters of an hour on two CPU cores with AMX. Nothing is downloaded: the texts are made here or come from Python's own
documentation topics. The folder holds the tokenizer, a checkpoint and curves.jsonl. The method is that of DeepSeek-V3.2-Exp: a dense model;
then the indexer alone learns where it attends; then the whole model trains with only the chosen keys.
"""
import os
import sys
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
# Without these, glibc returns large arrays to the system after each use, and half of the time is spent on page faults.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(6 * 10**8),
          "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@click.command(help=__doc__.split("\n")[0])
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "pydsa/demo/demo.gguf",
              help="the file to write  [pydsa/demo/demo.gguf]")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default="demo-run", help="checkpoint and curves  [demo-run]")
@click.option("--seed", type=int, default=0, help="of weights and texts  [0]")
@click.option("--device", default="cpu", help="cpu or cuda  [cpu]")
@click.option("-t", "--threads", type=click.IntRange(1), help="CPU threads  [torch's choice]")
@click.option("--stop-after", type=int, help="stop after this phase, the first is 0")
@click.option("--export-only", is_flag=True, help="write the checkpoint as it is")
def main(output, folder, seed, device, threads, stop_after, export_only):
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    import torch

    from tools.demo.export import export
    from tools.demo.train import PHASES, Training

    if threads:
        torch.set_num_threads(threads)
    training = Training(folder, seed, PHASES if stop_after is None else PHASES[:stop_after + 1], device)
    for row in () if export_only else training.run():
        click.echo("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    path = export(output, training.spec, training.weights, training.vocabulary)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB after {training.step} steps")


if __name__ == "__main__":
    main()
