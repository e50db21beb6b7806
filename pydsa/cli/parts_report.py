"""What `pydsa info` tells of a folder with some parts of a split model: which are missing, and which layers can run."""
import collections
import contextlib
import functools
import itertools
from pathlib import Path

from pydsa.errors import GGUFError, PydsaError
from pydsa.gguf.file import SPLIT_NAME, open_part
from pydsa.models import architecture
from pydsa.models.blocks import begins_a_stage, block_of, spans
from pydsa.terminal import visible
from pydsa.words import size

EMBEDDING, HEAD, NORM = "token_embd.weight", "output.weight", "output_norm.weight"


def find_parts(folder):
    """The split models in a folder: {(name, number of parts): {number: Path}}."""
    found = {}
    try:
        for path in sorted(Path(folder).iterdir()):
            name = SPLIT_NAME.fullmatch(path.name)
            if name and 1 <= int(name[2]) <= int(name[3]):
                found.setdefault((name[1], int(name[3])), {})[int(name[2])] = path
    except OSError as error:
        raise GGUFError(f"{folder}: the folder cannot be read ({error.strerror}).") from error
    return found


def describe_parts(folder):
    """What is there of each split model in a folder, dicts of JSON types.

    layers: those that can run here. first: those of them with which a stage may begin. open: those of which tensors may be in a part that
    is not here. embedding, output: whether the tensors before and after the layers are here. n_layer: None without the first part, which
    has the metadata. Raises GGUFError for damaged parts.
    """
    return [_describe(name, count, paths) for (name, count), paths in find_parts(folder).items()]


def _describe(name, count, paths):
    parts = {number: open_part(path, f"part {number} of {count} of a model") for number, path in paths.items()}
    tensors = {number: list(part.tensors) for number, part in parts.items()}
    everything = {tensor for some in tensors.values() for tensor in some}
    metadata = parts[1].metadata if 1 in parts else None
    config = None if metadata is None else _config(metadata)
    n_layer, kind = (None, None) if config is None else (config.n_layer, functools.partial(_kind, config))
    blocks = {block_of(tensor) for tensor in everything} - {-1}
    if n_layer is not None:
        blocks &= set(range(n_layer))
    edges = _at_edges(tensors, count)
    forms = {}          # kind of a layer -> sets of the names of its tensors, without the number
    for il in blocks - edges:
        forms.setdefault(kind and kind(il), set()).add(_form(everything, il))
    whole = sorted(il for il in blocks if il not in edges or kind and _form(everything, il) in forms.get(kind(il), ()))
    return {"model": name, "n_parts": count, "missing": [number for number in range(1, count + 1) if number not in paths],
            "parts": [{"part": number, "file": str(paths[number]), "bytes": part.n_bytes,
                       "layers": sorted({block_of(tensor) for tensor in tensors[number]} - {-1}),
                       "others": [tensor for tensor in tensors[number] if block_of(tensor) < 0]} for number, part in parts.items()],
            "n_layer": n_layer, "layers": whole, "first": [il for il in whole if config is None or begins_a_stage(config, il)],
            "open": sorted(blocks - set(whole)), "embedding": EMBEDDING in everything,
            "output": NORM in everything and (HEAD in everything or EMBEDDING in everything and len(paths) == count)}


def _config(metadata):
    """The Config of a model; None if its metadata are not valid."""
    with contextlib.suppress(PydsaError):
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        return architecture(metadata).Config.from_metadata(metadata, max(1, len(tokens)))
    return None


def _kind(config, il):
    """What layers have in common that have tensors of the same names."""
    return il < config.n_layer_dense_lead, config.indexed_layers is not None and config.indexed_layers[il] == il


def _at_edges(tensors, count):
    """The layers of which more tensors may be in a part that is not here.

    They are the first and the last of a part beside which one is missing; all, if the tensors of a layer are scattered. tensors: {number of
    a part: names of its tensors}.
    """
    runs = [block for block, _ in itertools.groupby(block_of(name) for number in sorted(tensors) for name in tensors[number])]
    if len(tensors) < count and any(n > 1 for block, n in collections.Counter(runs).items() if block >= 0):
        return set(runs)
    edges = set()
    for number, names in tensors.items():
        blocks = [block for block in map(block_of, names) if block >= 0]
        if blocks and number - 1 not in tensors and number > 1:
            edges.add(blocks[0])
        if blocks and number + 1 not in tensors and number < count:
            edges.add(blocks[-1])
    return edges


def _form(tensors, il):
    prefix = f"blk.{il}."
    return frozenset(tensor.removeprefix(prefix) for tensor in tensors if tensor.startswith(prefix))


def format_parts(reports):
    """What describe_parts() returns, as text."""
    lines = []
    for report in reports:
        count, missing = report["n_parts"], report["missing"]
        lines += [""] * bool(lines) + [f"{report['model']}: {count - len(missing)} of {count} parts are in this folder" + (
            f"; missing: {_ranges(missing)}" if missing else "")]
        for part in report["parts"]:
            layers = _in_words(part["layers"]) if part["layers"] else ""
            lines.append(f"  part {part['part']:<5} {size(part['bytes']):>10}  {', '.join(filter(None, [layers, *part['others']]))}")
        if not missing:
            lines.append(f"  all of the model is here: pydsa info {report['parts'][0]['file']}")
            continue
        of = "" if report["n_layer"] is None else f" of {report['n_layer']}"
        lines.append(f"layers that a stage can run here: {_ranges(report['layers']) or 'none'}{of}")
        ends = [f"the {what} {'is' if report[key] else 'is not'} here" for key, what in (("embedding", "embedding"), ("output", "output"))]
        lines.append(f"  {', '.join(ends)} (the first stage needs the embedding, and it or the last the output)")
        if report["first"] != report["layers"]:
            first = _in_words(report["first"]) if report["first"] else "none of them"
            lines.append(f"  a stage may begin with {first}: the others share the choice of an earlier one")
        if report["open"]:
            more = len(report["open"]) > 1
            lines.append(f"  {_in_words(report['open'])}: a part that is not here may have more of {'their' if more else 'its'} tensors")
        if 1 in missing:
            lines.append("  the first part is not here: it has the metadata, and each node needs it")
    return "".join(f"{visible(line)}\n" for line in lines)


def _in_words(layers):
    """[1, 2, 3, 5] -> "layers 1-3, 5"."""
    return f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}"


def _ranges(numbers):
    """[1, 2, 3, 5] -> "1-3, 5"."""
    return spans(["x" if n in numbers else "" for n in range(max(numbers, default=0) + 1)]).get("x", "")
