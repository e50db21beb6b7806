"""Options of `pydsa info` for nodes of a model in stages.

They need not be there.
"""
import click

from pydsa.cli.shared import options

LINK, LATENCY, BANDWIDTH, GOPS = "10Gbit/s", 100.0, 100.0, 1500.0       # of nodes that are not told
GIVEN_WITH = ("node_memory", "link", "latency", "wire", "streams", "gops")      # options that have a meaning only with --stages
NOT_WITH = ("gpu_memory", "n_gpu_layers", "cpu_moe", "n_cpu_moe", "override_tensor", "tensor_split", "fit_margin", "stream_from", "check",
            "mlock", "mmap")
IN_WORDS = dict(n_gpu_layers="gpu-layers", mmap="no-mmap")       # options whose name is another

node_options = options(
    click.option("--stages", metavar="N|auto|RANGES",
                 help="Show what the model takes in stages on nodes: N; as --node-memory says (auto); or layers, like 0-20,21-40,41-60."),
    click.option("--node-memory", metavar="SIZE[,...]",
                 help="Memory for pydsa on each node, like 384GiB or 384GiB,256GiB; auto with one size: as few nodes as will do."),
    click.option("--link", metavar="RATE", help=f"What a node sends to another, in Gbit/s or GB/s.  [default: {LINK}]"),
    click.option("--latency", type=float, metavar="US", help=f"Microseconds from sending to use.  [default: {LATENCY:g}]"),
    click.option("--wire", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True, help="Type of what stages send."),
    click.option("--streams", type=click.IntRange(1, 1024), metavar="N",
                 help="Conversations with caches of their own.  [default: as many as stages]"),
    click.option("--gops", metavar="GOP/s[,...]",
                 help=f"Products that a node does, for prompts; a multiply-add is two.  [default: {GOPS:g}]"))


def check_given(given, stages):
    """Raise UsageError for options that do not belong together.

    given: the names of those on the command line. stages: the value of --stages, or None.
    """
    wrong = [name for name in (GIVEN_WITH if stages is None else NOT_WITH) if name in given]
    if wrong:
        option = "--" + IN_WORDS.get(wrong[0], wrong[0]).replace("_", "-")
        raise click.UsageError(f"{option} is for --stages: give it too, or leave {option} out." if stages is None else
                               f"--stages shows a plan of nodes with one device each: leave out {option}.")


def forecast_of(model, stages, bandwidth, settings, node_memory, link, latency, wire, streams, gops):
    """The Setup of a model, and the forecast of its stages.

    settings: the options of the model by name. The other arguments are the values of the options.
    """
    from pydsa.backends.devices import AUTO, HOST, check_devices
    from pydsa.options import bytes_per_second
    from pydsa.setup import Setup
    from pydsa.stages.division import divided, parse
    from pydsa.stages.forecast import CHUNK, Link, forecast
    stages = parse(stages)
    settings = {name: value for name, value in settings.items() if name not in NOT_WITH}
    devices = check_devices(HOST if settings["device"] == AUTO else settings["device"])
    if len(devices) > 1:
        raise click.UsageError(f"--stages shows a plan of nodes with one device each: expected one in --device, not {','.join(devices)}.")
    network = Link(bytes_per_second("link", LINK if link is None else link), (LATENCY if latency is None else _latency(latency)) / 1e6)
    kinds = _each("--bandwidth", bandwidth, BANDWIDTH), _each("--gops", gops, GOPS), _sizes(node_memory)
    settings |= dict(device=devices[0], n_ubatch=min(settings["n_ubatch"], CHUNK))
    if settings["n_ctx"] == 0:
        settings["n_ctx"] = Setup(model, **settings | {"n_ctx": None}).config.n_ctx_train
    setup = Setup(model, **settings)
    nodes = _nodes(setup, stages, *kinds, streams)
    ranges = divided(stages, setup, nodes, n_sessions=streams or len(nodes))
    assumed = [name for name, value in (("link", link), ("latency", latency), ("bandwidth", bandwidth), ("gops", gops)) if value is None]
    return setup, forecast(setup, ranges, nodes, network, wire, streams, assumed)


def _latency(latency):
    if not 0 <= latency < 1e9:
        raise click.UsageError(f"--latency is {latency:g}, expected microseconds from 0 on.")
    return latency


def _each(option, text, default):
    """Numbers of 10^9 a second, one for each node or one for all of them."""
    if text is None:
        return [default * 1e9]
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if not all(0 < one < 1e9 for one in found):
        raise click.UsageError(f"{option} is {text!r}, expected a number, or one for each node with commas between, like 100,200.")
    return [one * 1e9 for one in found]


def _sizes(text):
    from pydsa.options import size_in_bytes
    return [None] if text is None else [size_in_bytes("node_memory", part) for part in text.split(",")]


def _nodes(setup, stages, bandwidths, rates, memories, streams):
    """The Nodes, one for each stage.

    AUTO is as many as there are values; where one size is for all, the least number of such nodes.
    """
    from pydsa.stages.division import AUTO, fewest
    lengths = {len(values) for values in (bandwidths, rates, memories)} - {1}
    n = stages if isinstance(stages, int) else len(stages) if stages != AUTO else max(lengths, default=None)
    if n is None and memories[0] is None:
        raise click.UsageError("--stages auto needs nodes: give --node-memory, one size for nodes that are all alike, or one for each.")
    if n is None:
        n = fewest(setup, _alike(1, bandwidths, rates, memories)[0], streams)
    wrong = next((values for values in (memories, bandwidths, rates) if len(values) not in (1, n)), None)
    if wrong is not None:
        option = {id(memories): "--node-memory", id(bandwidths): "--bandwidth", id(rates): "--gops"}[id(wrong)]
        raise click.UsageError(f"{option} has {len(wrong)} values for {n} nodes, expected one for each, or one for all.")
    return _alike(n, bandwidths, rates, memories)


def _alike(n, bandwidths, rates, memories):
    from pydsa.stages.division import Node
    bandwidths, rates, memories = (values * n if len(values) == 1 else values for values in (bandwidths, rates, memories))
    return [Node(f"node {i + 1}", *pair) for i, pair in enumerate(zip(bandwidths, memories, rates))]
