"""Check and time a model over a GPU and the CPU: logits, generation, prompts.

    python tools/check_placement.py v3.2-layers-Q4_K_M.gguf -p 2048,4096

The model is made if the file is not there. Its logits with experts on the CPU, those of all layers and of the first ones, are compared with
those of the GPU alone; the exit code is 1 if they differ. It is timed too, once where both are the same. The shares of the limits are
figures, not checks.
"""
import sys
import warnings
from pathlib import Path

import click
import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pydsa  # noqa: E402
from pydsa.bench import Bench, format_rows, test_name  # noqa: E402
from pydsa.cli.shared import comma_numbers  # noqa: E402
from tools.make_model import PRESETS, ModelSpec, make_model  # noqa: E402

N_LOGITS = 24       # tokens whose logits are compared, with one at a time after them
SOME = 8            # of them
GOALS = {"n_gen": 0.85, "n_prompt": 0.7}        # shares of the limits of devices one after the other, and of the bus
NMSE = 1e-5         # at most, in the median over tokens: rounded activations may flip a choice of experts for one


def logits(model):
    """Logits of a short prompt and of single tokens, float32 [n, n_vocab]."""
    ids, session = np.random.default_rng(0).integers(0, model.config.n_vocab, N_LOGITS + SOME), model.session()
    return np.array([*session.logits(ids[:N_LOGITS]), *map(session.decode, ids[N_LOGITS:])])


def median_nmse(met, expected):
    """The median over tokens of the normalised squared error."""
    met, expected = met.astype(np.float64), expected.astype(np.float64)
    return float(np.median(((met - expected) ** 2).sum(-1) / (expected ** 2).sum(-1)))


def made(path, preset):
    """Write the random model of a preset, unless the file is there."""
    if not path.exists():
        click.echo(f"making {path}")
        make_model(path, ModelSpec(**PRESETS[preset] | {"type": "Q4_K_M"}))


def placements(model):
    """{name: options of load()} that are timed, for a model of some layers."""
    config = model.config
    first = next((il for il in range(config.n_layer) if f"blk.{il}.ffn_gate_inp.weight" in model.setup.file.tensors), 0)
    return {"--cpu-moe": dict(cpu_moe=True), f"--n-cpu-moe {first + 1}": dict(n_cpu_moe=first + 1)}


def goals(rows):
    """Sentences on the shares of the limits that rows of Bench.run reached."""
    for row in rows:
        name, key = test_name(row["n_prompt"], row["n_gen"], row["n_depth"]), "n_prompt" if row["n_prompt"] else "n_gen"
        share = row["share_of_limit"]
        if share is None:
            yield f"{name}: no limit is known, so that its share is not measured"
        else:
            yield f"{name}: {share:.2f} of the limit, {'below' if share < GOALS[key] else 'at least'} {GOALS[key]}"


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--device", default="cuda", show_default=True, help="The device of what is not on the CPU.")
@click.option("--preset", default="v3.2-layers", show_default=True, help="The model to make if the file is not there.")
@click.option("-p", "n_prompt", default="2048,4096", show_default=True, help="Prompt lengths to time.")
@click.option("-n", "n_gen", default=32, show_default=True, type=click.IntRange(1), help="Number of tokens to generate.")
@click.option("-r", "repetitions", default=2, show_default=True, type=click.IntRange(1), help="Number of times that each test runs.")
def main(path, device, preset, n_prompt, n_gen, repetitions):
    warnings.simplefilter("ignore")
    made(path, preset)
    tests = Bench(comma_numbers("-p", n_prompt), [n_gen], [0], repetitions)
    options = dict(n_ctx=max(tests.n_ctx, N_LOGITS + SOME), device=device)
    model = pydsa.load(path, **options)
    expected, wrong, timed = logits(model), [], None
    kinds = placements(model)
    del model       # its memory
    for name, placement in kinds.items():
        model = pydsa.load(path, **options, **placement)
        error = median_nmse(logits(model), expected)
        click.echo(f"{name} on {model.setup.device_name}: logits within {error:.1e} of {device} alone")
        wrong += [name] * (not error <= NMSE)
        on_cpu = set(model.runner.on["cpu"].weights)
        if on_cpu != timed:
            rows, timed = list(tests.run(model)), on_cpu
            click.echo(format_rows(rows, "md"))
            click.echo("\n".join(goals(rows)) + "\n")
        del model
    if wrong:
        click.echo(f"Logits differ by more than {NMSE:.0e}: {', '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
