"""The reports of `pydsa info` and `pydsa trace`, as data and as text.

`info` shows the file, the configuration, the memory and how each layer runs; `trace` compares two backends node by node.
"""
import collections
import dataclasses

import numpy as np

from pydsa.backends.devices import HOST, backend_of, device_of
from pydsa.chat import USER
from pydsa.errors import PydsaError
from pydsa.executor.costs import StepSize, step_cost
from pydsa.executor.streaming import ASSUMED, ASSUMED_BUS, measure, pays_from
from pydsa.machine.numa import describe_numa
from pydsa.models.blocks import block_of, spans
from pydsa.options import EXACT
from pydsa.stages.forecast import in_words
from pydsa.terminal import visible
from pydsa.text.tokenizer import MODEL, PRE_TOKENIZERS
from pydsa.words import attention_in_words, count, layers_in_words, plan_in_words, size

USUAL = 100e9, 1000e9       # bytes per second: two channels or more of a CPU's memory, and a GPU's
HIDDEN = {"rope", "n_ff", "n_ff_exp", "indexer_full"}       # fields of a Config that are reported elsewhere or not at all


def describe(setup, bandwidths=None, here=True, forecast=None):
    """A Setup as a dict of JSON types; sizes are bytes.

    bandwidths: bytes per second that the CPU and a GPU read of their memory, for the plan of a fitted Setup; None: usual ones. here:
    whether its GPUs are this machine's, whose rates are measured where experts are streamed. forecast: that of the model in stages, if it
    is asked for (stages/forecast.py).
    """
    config, metadata = setup.config, setup.file.metadata
    model, pre = (metadata.string(f"tokenizer.ggml.{key}", default=None) for key in ("model", "pre"))
    types = {}
    for tensor in setup.file.tensors.values():
        count, size = types.get(tensor.type, (0, 0))
        types[tensor.type] = count + 1, size + tensor.data.nbytes
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in HIDDEN}
    return {
        "files": [str(path) for path in setup.file.paths], "file_bytes": setup.file.n_bytes, "gguf_version": setup.file.version,
        "notes": setup.notes, "overrides": {key: {"value": value, "file": plain(old)} for key, (value, old) in setup.overrides.items()},
        "n_params": setup.n_params, "config": fields | {"kq_scale": config.kq_scale},
        "rope": {key: metadata.get(f"{config.architecture}.rope.{key}") for key in ("freq_base", "scaling.type", "scaling.factor")},
        "n_ff": list(config.n_ff), "n_ff_exp": [n if il >= config.n_layer_dense_lead else 0 for il, n in enumerate(config.n_ff_exp)],
        "tokenizer": {"model": model, "pre": pre, "supported": model == MODEL and pre in PRE_TOKENIZERS,
                      "chat_format": chat_format(metadata)},
        "tensor_types": {name: {"tensors": count, "bytes": size} for name, (count, size) in sorted(types.items())},
        "n_tensors_unused": len(setup.file.tensors) - len(setup.weights.read),
        "n_mtp_blocks": len({block_of(name) for name in setup.file.tensors} - set(range(-1, config.n_layer))),
        "device": setup.device_name, "gpu": _gpu(setup), "plan": None if setup.plan is None else _plan(setup, bandwidths),
        "numa": describe_numa() if any(device_of(name).places for name in setup.placement.devices) else None,
        "n_ctx": setup.n_ctx, "n_ubatch": setup.n_ubatch, "kv_type": setup.kv_type,
        "index_type": setup.index_type if setup.config.top_k else None,
        "memory": {"weights_mapped": setup.mapped_bytes, "weights_copied": setup.copied_bytes, "caches": setup.cache_bytes,
                   "scratch": setup.scratch_bytes, "scores": setup.score_bytes, "packed_latents": setup.packed_latent_bytes,
                   "slots": setup.slot_bytes},
        "streaming": describe_streaming(setup, here), "stages": forecast,
        "attention": attention_in_words(setup), "reproducible": setup.reproducible, "precision": setup.precision,
        "plain_form_until": setup.schedule.plain_form_until,
        "layers": layers_in_words(setup)}


def describe_streaming(setup, here=True):
    """How experts are copied to GPUs for prompts, as a dict; None if never.

    stream_from: the tokens of a step from which on they are; 0: never. The rates that decide about it, in 1e9 bytes and operations a
    second, are those of this machine, where its GPUs can be used, or assumed ones; None where the number was given. here: whether the GPUs
    are this machine's.
    """
    streaming = setup.streaming
    if not streaming.slots:
        return None
    n_bytes = collections.Counter()
    for device, _, tensor in streaming.arrivals:
        n_bytes[device] += tensor.data.nbytes
    report = {"stream_from": streaming.stream_from, "rates": None, "bytes": dict(n_bytes), "bus_gbs": None, "bandwidth_gbs": None,
              "peak_gops": None}
    if streaming.stream_from is not None:
        return report
    rates = _measured_rates(streaming) if here else None
    source, rates = ("measured", rates) if rates else ("assumed", ASSUMED._replace(bus=dict.fromkeys(streaming.slots, ASSUMED_BUS)))
    return report | {"stream_from": pays_from(streaming.arrivals, rates, setup.n_ubatch), "rates": source,
                     "bus_gbs": {name: rate / 1e9 for name, rate in rates.bus.items()}, "bandwidth_gbs": rates.bandwidth / 1e9,
                     "peak_gops": rates.peak / 1e9}


def _measured_rates(streaming):
    """The streaming.Rates of this machine; None where its GPUs cannot be used."""
    try:
        backends = {name: backend_of(name) for name in (HOST, *streaming.slots)}
        return measure(streaming, backends, backends[HOST].check_threads(None))
    except PydsaError:
        return None


def _streaming_in_words(report, n_ubatch):
    """Two lines on describe_streaming()'s report."""
    where = " and ".join(f"{size(n)} to {name}" for name, n in report["bytes"].items())
    n = report["stream_from"]
    yield f"experts on {HOST}: " + (
        f"copied for ubatches of {n} tokens or more, {where}, and multiplied there" if n else
        f"never copied to the GPU, as {HOST} takes less time for ubatches of {n_ubatch}")
    if report["rates"]:
        bus = " and ".join(f"{rate:.0f} GB/s to {name}" for name, rate in report["bus_gbs"].items())
        yield (f"  {report['rates']}: {bus}; {HOST} reads {report['bandwidth_gbs']:.0f} GB/s and does {report['peak_gops']:.0f} GOP/s of "
               "products")


def _gpu(setup):
    """A description of the GPU, or None; a plan has its own."""
    if setup.plan is not None and setup.plan.automatic:
        return None
    return next(filter(None, (device_of(name).describe() for name in setup.placement.devices)), None)


def _plan(setup, bandwidths):
    """The plan of a fitted Setup, with what bounds the speed of generation.

    That is what a token at the end of the context reads on each device, as if these did not work at the same time.
    """
    n_bytes, rates = token_bytes(setup), {}
    for share in setup.plan.shares:
        on_gpu = device_of(share.device).reserved > 0
        rates[share.device] = (bandwidths or USUAL)[on_gpu]
    devices = [share._asdict() | {"token_bytes": n_bytes.get(share.device, 0), "bandwidth": rates[share.device]}
               for share in setup.plan.shares]
    seconds = sum(device["token_bytes"] / device["bandwidth"] for device in devices)
    return {"options": setup.plan.options, "where": setup.plan.where, "devices": devices, "notes": list(setup.plan.notes),
            "bandwidth_assumed": bandwidths is None, "bound_ts": 1 / seconds, "lines": plan_in_words(setup.plan)}


def token_bytes(setup):
    """Bytes that one token at the end of the context reads, {device: bytes}."""
    size = StepSize(1, setup.n_ctx - 1, setup.cache_row_bytes)
    found = {}
    for device, nodes in setup.layouts[setup.schedule.variant(setup.n_ctx - 1, 1)].segments:
        cost = step_cost([node for _, node in nodes], size)
        found[device] = found.get(device, 0) + cost.weights + cost.cache
    return found


def _format_plan(plan):
    """The lines of a plan, and of the bound of generation's speed."""
    if plan is None:
        return []
    reads = ", ".join(f"{size(device['token_bytes'])} on {device['device']} at {device['bandwidth'] / 1e9:g} GB/s"
                      for device in plan["devices"] if device["token_bytes"])
    assumed = " (assumed: --bandwidth gives others)" if plan["bandwidth_assumed"] else ""
    return ["", "plan", *(f"  {line}" for line in plan["lines"]),
            f"  a token at the end of the context reads {reads}{assumed}: at most {plan['bound_ts']:.3g} tokens a second"]


def plain(value):
    """A value of the metadata as a JSON type."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def chat_format(metadata):
    """The source of a file's chat format, in words."""
    if "tokenizer.chat_template" in metadata:
        return "template of the file"
    has_v32_tokens = USER in metadata.strings("tokenizer.ggml.tokens", default=[])
    return "built-in DeepSeek V3.2" if has_v32_tokens else "none: prompts need --raw"


def format_report(report):
    """The report of describe() as text."""
    config, memory = report["config"], report["memory"]
    lines = [f"{config['name']}: {config['architecture']}, {count(report['n_params'])} parameters, {size(report['file_bytes'])} in "
             f"{len(report['files'])} file{'s' * (len(report['files']) > 1)}", *(f"note: {note}" for note in report["notes"]), ""]
    lines += [f"overridden: {key} = {entry['value']!r} ({'not in the file' if entry['file'] is None else repr(entry['file'])[:80]})"
              for key, entry in report["overrides"].items()]
    lines += ["configuration"] + [f"  {name:22} {value:g}" if isinstance(value, float) else f"  {name:22} {value}"
                                  for name, value in config.items() if name not in ("architecture", "name")]
    lines += [f"  {name:22} {', '.join(f'{n} in layers {which}' for n, which in spans(report[name]).items() if n)}"
              for name in ("n_ff", "n_ff_exp") if any(report[name])]
    lines += [f"  {'rope.' + name:22} {value:g}" if isinstance(value, float) else f"  {'rope.' + name:22} {value}"
              for name, value in report["rope"].items() if value is not None]
    tokenizer, caches = report["tokenizer"], f"latents {report['kv_type']}"
    if report["index_type"]:
        caches += f", index keys {report['index_type']}"
    unknown = "" if tokenizer["supported"] else f" (not supported, expected {MODEL} with one of {', '.join(PRE_TOKENIZERS)})"
    lines += ["", f"tokenizer: {tokenizer['model']}, {tokenizer['pre']}{unknown}; chat format: {tokenizer['chat_format']}", "", "tensors"]
    lines += [f"  {name:6} {entry['tensors']:6}  {size(entry['bytes'])}" for name, entry in report["tensor_types"].items()]
    if report["n_mtp_blocks"]:
        lines.append(f"  {report['n_mtp_blocks']} MTP block(s) for speculative decoding: recognised, but not used")
    if report["n_tensors_unused"]:
        lines.append(f"  {report['n_tensors_unused']} of the tensors are not used")
    lines += ["", f"GPU: {report['gpu']}"] if report["gpu"] else []
    lines += ["", *numa_in_words(report["numa"])] if report["numa"] else []
    lines += _format_plan(report["plan"])
    lines += ["", "stages", *(f"  {line}" for line in in_words(report["stages"]))] if report["stages"] else []
    lines += ["", f"memory on {report['device']}, {report['n_ctx']} tokens of context, ubatches of {report['n_ubatch']}",
              f"  weights mapped  {size(memory['weights_mapped']):>12}", f"  weights copied  {size(memory['weights_copied']):>12}",
              f"  caches          {size(memory['caches']):>12}  ({caches})", f"  scratch         {size(memory['scratch']):>12}",
              f"  rows of scores  {size(memory['scores']):>12}  (at the end of the context)",
              f"  packed latents  {size(memory['packed_latents']):>12}  (as the attention of prompts takes them)",
              *([f"  slots           {size(memory['slots']):>12}  (for experts that are copied to the GPU for a step)"] if memory["slots"]
                else []), "", f"attention: {report['attention']}"]
    if report["reproducible"]:
        lines.append("  reproducible: a token's logits do not depend on the steps that it runs in")
    if report["precision"] == EXACT:
        lines.append("  exact: where a GPU multiplies, activations of prompts are two float16 each")
    if report["plain_form_until"]:
        lines.append(f"  prompts in ubatches of {report['n_ubatch']} have keys and values for each head, where that takes "
                     f"less time, up to {report['plain_form_until']} tokens")
    lines += [f"  layers {which}: {kind}" for kind, which in report["layers"].items()]
    if report["streaming"]:
        lines += ["", *_streaming_in_words(report["streaming"], report["n_ubatch"])]
    return "".join(f"{visible(line)}\n" for line in lines)


def numa_in_words(numa):
    """What numa.describe_numa() says, as lines."""
    if not numa["options"]:
        return ["NUMA: there is one node for threads, so --numa changes nothing"]
    lines = ["NUMA: nodes of this machine, and what --numa does"]
    for node in numa["nodes"]:
        cpus = f"{node['cores']} core{'s' * (node['cores'] > 1)} (CPUs {node['cpus']})" if node["cpus"] else "no CPUs for this process"
        memory = "no memory" if not node["memory"] else size(node["memory"]) + ("" if node["memory_allowed"] else ", not for this process")
        lines.append(f"  {'node ' + str(node['node']):12} {cpus}; {memory}")
    return lines + [f"  {word:12} {sentence}" for word, sentence in numa["options"].items()]


def compare_nodes(model, reference, ids):
    """Run ids on two models of the same file -> a row for each node.

    A row is a dict with node, op, shape and error, the difference() of model from reference. Rows are in the order of the model's steps,
    which need not be the reference's; ops of equal names are in the same order in both.
    """
    expected, rows = collections.defaultdict(list), []
    reference.session().prefill(ids, observe=lambda node, arrays: expected[node.name, node.op].append([a.copy() for a in arrays]))

    def compare(node, arrays):
        error = max((difference(a, b) for a, b in zip(arrays, expected[node.name, node.op].pop(0))), default=0.0)
        rows.append({"node": node.name, "op": node.op, "shape": "x".join(map(str, arrays[0].shape)) if arrays else "", "error": error})

    model.session().prefill(ids, observe=compare)
    return rows


def difference(array, expected):
    """The normalised squared error of an array.

    It is that of the finite values, and infinite if only one of the two is finite somewhere, or if there is NaN. For integers it is the
    share of elements that differ.
    """
    if array.dtype.kind == "i":
        return float(np.mean(array != expected))
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(array)) or np.isnan(expected).any():
        return float("inf")
    a, b = array[finite].astype(np.float64), expected[finite].astype(np.float64)
    return float(((a - b) ** 2).sum() / max((b ** 2).sum(), 1e-300))
