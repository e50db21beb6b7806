"""What a model is and how it runs, in words: for reports, titles, and the cards that notebooks show."""
import shlex

from pydsa.cards import Card, shortened, tokens_in_words
from pydsa.errors import PydsaError
from pydsa.executor.placement import is_of_experts
from pydsa.models.blocks import block_of, spans
from pydsa.options import EXACT, size

LAST = 48       # tokens of a session whose text is shown


def attention_in_words(setup):
    """The attention that the steps of a model use, in words."""
    if setup.config.top_k is None:
        there = any(block_of(name) >= 0 and ".indexer." in name for name in setup.file.tensors)
        return f"dense (the {f'architecture {setup.config.architecture}' if there else 'model'} has no indexer)"
    if setup.attention == "dense":
        return "dense (asked for; the model was trained to attend to the keys its indexer chooses)"
    if setup.attention != "auto":
        return f"{setup.attention}, {setup.config.top_k} keys"
    beyond = f", sparse with {setup.config.top_k} keys beyond" if "sparse" in setup.schedule.variants else ""
    return f"dense up to {setup.config.top_k} tokens, where it is exact{beyond}"


def layers_in_words(setup):
    """{description of a layer: the layers it holds for, "0-2, 5"}."""
    config = setup.config
    indexed = config.indexed_layers

    def describe_layer(il):
        ffn = "dense ffn" if il < config.n_layer_dense_lead else f"{config.n_expert_used} of {config.n_expert} experts"
        if indexed is None or setup.attention == "dense":
            return f"dense attention, {ffn}"
        indexer = "own indexer" if indexed[il] == il else "the choice of the last layer with an indexer"
        kind = setup.attention if setup.attention != "auto" else "dense, then sparse" if "sparse" in setup.schedule.variants else "dense"
        return f"{kind} attention, {indexer}, {ffn}"

    return spans([describe_layer(il) for il in range(config.n_layer)])


def threads(n, n_batch):
    """Numbers of threads in words; that of prompts only where it differs."""
    return f"{n} thread{'s' * (n != 1)}" + (f" ({n_batch} for prompts)" if n_batch != n else "")


def count(n):
    """A number of parameters as readable text."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def options_in_words(placing):
    """A placement.Placing as options of the command line."""
    parts = [f"--device {','.join(placing.devices)}"]
    if placing.n_gpu_layers is not None:
        parts.append(f"-ngl {placing.n_gpu_layers}")
    if placing.tensor_split is not None and len(placing.devices) > 1:
        parts.append("-ts " + ",".join(f"{n:g}" for n in placing.tensor_split))
    if placing.cpu_moe:
        parts.append("--cpu-moe")
    elif placing.n_cpu_moe:
        parts.append(f"--n-cpu-moe {placing.n_cpu_moe}")
    return " ".join(parts + [f"-ot {shlex.quote(f'{pattern.pattern}={device}')}" for pattern, device in placing.rules])


def placement_in_words(setup):
    """What each device of a model has: {device: "layers 0-60"}."""
    placement, layers, parts = setup.placement, setup.layers, {}
    homes = spans([None] * layers.start + list(placement.layers))
    for device, which in homes.items():
        if device is None:
            continue
        parts.setdefault(device, []).append(f"layer{'s' * (not which.isdigit())} {which}")
    moved = {}      # device -> layers whose experts are there by a rule, and the number of other weights
    for name in setup.weights.used:
        layer = block_of(name)
        home = placement.home(layer) if layer >= 0 else None
        device = placement.of_weight(name, layer)
        if device != home and (home is not None or device not in (placement.layers[0], placement.layers[-1])):
            experts, others = moved.setdefault(device, (set(), []))
            (experts.add if is_of_experts(name) else others.append)(layer)
    for device, (experts, others) in moved.items():
        if experts:
            which = spans([layer in experts for layer in range(layers.stop)])[True]
            parts.setdefault(device, []).append(f"experts of layer{'s' * (not which.isdigit())} {which}")
        if others:
            parts.setdefault(device, []).append(f"{len(others)} other weight{'s' * (len(others) != 1)}")
    return {device: ", ".join(found) for device, found in parts.items()}


def plan_in_words(plan):
    """A fitting.Plan as lines: one for each device, and what it is in options."""
    rows = [("device", "", "weights", "caches", "scratch", "free")]
    for share in plan.shares:
        few = share.weights < share.mapped / 100        # vectors
        parts = ([f"{size(share.mapped)} mapped"] if share.mapped else []) + ([] if few else [size(share.weights)])
        rows.append((share.device, share.title, " + ".join(parts), size(share.caches),
                     size(share.scratch + share.reserved), "?" if share.free is None else size(max(0, share.free))))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([*(cell.ljust(n) for cell, n in zip(row[:2], widths)), *(cell.rjust(n) for cell, n in zip(row[2:], widths[2:]))])
             for row in rows]
    where = "; ".join(f"{device}: {what}" for device, what in plan.where.items())
    return [*lines, f"as {plan.options} ({where})", *plan.notes]


def caches_in_words(setup):
    """The types of a model's caches."""
    return f"latents {setup.kv_type}" + (f", index keys {setup.index_type}" if setup.config.top_k else "")


def card_of_a_setup(setup):
    """The Card of a setup.Setup: the file, the attention and the memory."""
    card = _of_a_file("Setup", setup)
    memory = [("weights in the mapped file", setup.mapped_bytes), ("weights copied", setup.copied_bytes),
              ("caches of a session", setup.cache_bytes), ("values of a step", setup.scratch_bytes + setup.score_bytes
                                                           + setup.packed_latent_bytes)]
    notes = [("note", note) for note in setup.notes]
    return card._replace(rows=card.rows + [(label, size(n)) for label, n in memory] + notes)


def card_of_a_model(model):
    """The Card of a model.Model: what it is, and how it is run."""
    setup = model.setup
    card = _of_a_file("Model", setup)
    place = setup.device_name if model.threads is None else f"{setup.device_name}, {threads(model.threads, model.threads_batch)}"
    place += f", --numa {setup.numa}" if setup.numa else ""
    place += ", exact" if setup.precision == EXACT else ""
    place = place if model.stages is None else f"{len(model.stages)} stages of layers {','.join(map(str, model.stages))}"
    rows = [*card.rows, ("caches", f"{caches_in_words(setup)}: {size(setup.cache_bytes)} a session"), ("device", place)]
    if len(setup.placement.devices) > 1:
        rows += [(f"on {device}", what) for device, what in placement_in_words(setup).items()]
    return card._replace(line=[*card.line, f"on {place}"], rows=rows)


def _of_a_file(kind, setup):
    config = setup.config
    experts = f", {config.n_expert_used} of {config.n_expert} experts" if config.n_expert else ""
    what = f"{config.architecture} {setup.file_type}"
    rows = [("name", config.name), ("file", str(setup.file.metadata.path)), ("architecture", f"{what}, {size(setup.n_bytes)}"),
            ("parameters", count(setup.n_params)), ("layers", f"{config.n_layer}{experts}"), ("attention", attention_in_words(setup)),
            ("context", f"{setup.n_ctx} tokens, prompts in ubatches of {setup.n_ubatch}")]
    return Card(kind, [shortened(config.name), what, f"{count(setup.n_params)} parameters", f"n_ctx={setup.n_ctx}"], rows)


def card_of_a_session(session, setup):
    """The Card of a session.Session: how full it is, and its last words."""
    n, held = session.n_past, session.n_past * sum(setup.cache_row_bytes.values())
    rows = [("context", f"{n} of {setup.n_ctx} tokens"),
            ("caches", f"{size(held)} of {size(setup.cache_bytes)} used ({caches_in_words(setup)})")]
    changed = [("hooks", ", ".join(type(hook).__name__ for hook in session.hooks))] if session.hooks else []
    if session.select is not None:
        changed.append(("select", getattr(session.select, "__name__", type(session.select).__name__)))
    line = [f"{n} of {setup.n_ctx} tokens", *(f"{name}: {value}" for name, value in changed)]
    if not n:
        return Card("Session", line, rows + changed)
    text = setup.tokenizer.decode(session.tokens[-LAST:])
    label = "text" if n <= LAST else f"the last {LAST} tokens"
    return Card("Session", [*line, shortened(text, end=True, more=n > LAST)], rows + changed, [(label, text, True)])


def card_of_a_recording(recording):
    """The Card of a recordings.Recording: of what it is, and what is in it.

    Of one that is still written to a file, or damaged, that alone.
    """
    facts = recording.facts
    model = "model", f"{facts.name}, {facts.architecture}, attention {facts.attention} on {facts.device}"
    try:
        return _of_a_recording(recording, facts, model)
    except PydsaError as error:
        return Card("Recording", [f"not complete: {error}"], [model, ("state", str(error))])


def _of_a_recording(recording, facts, model):
    positions = recording.positions
    tokens = tokens_in_words(recording.n) + (f", from position {positions[0]} to {positions[-1]}" if positions.size else "")
    left = f", {recording.n_left} older ones left" if recording.n_left else ""
    rows = [model, ("tokens", tokens + left)]
    if facts.top_k is not None and "selection" in facts.fields:
        dense = int(recording.all_keys.sum())
        rows.append(("selection", f"{facts.top_k} keys a token at most, {_layers(facts.choosing_layers)}"
                     + (f"; {tokens_in_words(dense)} attended to all keys" if dense else "")))
    if "scores" in facts.fields:
        rows.append(("scores", "of the chosen keys"))
    if "mass" in facts.fields and recording.n:
        means = [float(recording.mass[layer].mean()) for layer in recording.mass]
        rows.append(("mass", f"the chosen keys hold {min(means):.1%} to {max(means):.1%} of dense attention, by layer"))
    if "routing" in facts.fields:
        rows.append(("routing", f"{facts.n_expert_used} of {facts.n_expert} experts, {_layers(facts.expert_layers)}"
                     if facts.expert_layers else "no layer has experts"))
    rows.append(("size", size(recording.n_bytes)))
    return Card("Recording", [tokens_in_words(recording.n) + left, ", ".join(facts.fields), size(recording.n_bytes)], rows)


def _layers(layers):
    """Ascending numbers of layers: "layers 0-2, 5"."""
    return f"layer{'s' * (len(layers) != 1)} {spans([il in layers for il in range(layers[-1] + 1)])[True]}"
