"""List the kernels that a token's step launches on a GPU, layer by layer.

    python tools/launches.py model.gguf
    python tools/launches.py --emulated --kernels small.gguf

Nothing is computed, and nothing compiled: only the plan of the step is made. With --emulated there need be no GPU (tests/ptx).
"""
import collections
import re
import sys
from pathlib import Path

import click

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Names(list):
    """In place of launch.listing's dict: the kernels' names, one a launch."""

    def __setitem__(self, name, kernel):
        self.append(name)


def layer_of(node):
    """The layer of a node by its name, -1 outside of layers."""
    found = re.search(r"-(\d+)$", node.name)
    return int(found[1]) if found else -1


def launched(bound):
    """The kernels of a step of one token: {layer: [name, ...]}.

    bound: a plan.Bound on the backend cuda. A launch counts for the layer of the first of its ops; those of -1 stand before or after all.
    """
    from pydsa.backends.cuda.one_token.fuse import fused
    from pydsa.backends.cuda.runtime.launch import listing
    nodes, layers = {id(args): node for node, _, args in bound.calls}, collections.defaultdict(list)
    for (_, args), launches in fused([(op, args) for _, op, args in bound.calls]):
        listing.kernels = Names()
        try:
            for launch in launches:
                launch()
            layers[layer_of(nodes[id(args)])] += listing.kernels
        finally:
            listing.kernels = None
    return dict(layers)


def step_of(path, **settings):
    """The plan.Bound of a token's step of a model, with its weights on a GPU.

    settings: as pydsa.setup.Setup takes them.
    """
    from pydsa.backends import cuda
    from pydsa.executor.plan import Runner
    from pydsa.setup import Setup
    setup = Setup(path, device="cuda", **settings)
    runner = Runner({"cuda": cuda.on(0)}, setup.layouts, None, None)
    return runner.bind(setup.schedule.variant(setup.n_ctx - 1, 1), runner.make_caches(setup, setup.n_ctx), 1, 1, again=True)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True))
@click.option("--attention", default="sparse", show_default=True)
@click.option("--kv-type", default="i16", show_default=True)
@click.option("--n-ctx", default=4096, show_default=True)
@click.option("--kernels", is_flag=True, help="print the names of the kernels")
@click.option("--emulated", is_flag=True, help="on the GPU of tests/ptx, of capability 9.0")
def main(model, attention, kv_type, n_ctx, kernels, emulated):
    if emulated:
        from tests.ptx.driver import install
        install().capability = 9, 0
    layers = launched(step_of(model, attention=attention, kv_type=kv_type, n_ctx=n_ctx, n_ubatch=16))
    for layer, names in sorted(layers.items()):
        click.echo(f"{'outside of layers' if layer < 0 else f'layer {layer}':18}{len(names):4} launches")
        if kernels:
            click.echo("".join(f"    {name}\n" for name in names), nl=False)
    click.echo(f"{'in all':18}{sum(map(len, layers.values())):4} launches")


if __name__ == "__main__":
    main()
