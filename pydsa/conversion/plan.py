"""What a conversion gives, known before a weight is read: tensors, metadata, sizes, memory."""
import collections
import math
import os

import numpy as np

from pydsa.conversion.checkpoint import Checkpoint
from pydsa.conversion.metadata import model_keys, read_shape
from pydsa.conversion.names import outputs_of
from pydsa.conversion.tokenizer import tokenizer_keys
from pydsa.conversion.types import NAMES, check_importance, check_type, type_keys, types_of, wanting_importance
from pydsa.executor.cache import choose_cache_type
from pydsa.gguf.file import Metadata
from pydsa.gguf.layout import Layout
from pydsa.models import architecture
from pydsa.options import counts
from pydsa.quants import cache_row_bytes
from pydsa.text.tokenizer import Tokenizer
from pydsa.words import count, size

DEFAULT_N_CTX = 8192


class Conversion:
    """A folder of Hugging Face that can be converted.

    checkpoint, shape, outputs: see the modules of those names. keys: {key: value}, the metadata but for the type's, and metadata, the same
    as a GGUF file has them. config: the Config
    that a model of the output will have. notes: sentences on what is unusual. Headers, the configuration and the tokenizer are read and
    checked, weights are not. Raises CheckpointError, UnsupportedModelError or GGUFError.
    """

    def __init__(self, folder):
        self.checkpoint, self.notes = Checkpoint(folder), []
        self.shape = read_shape(self.checkpoint.config)
        self.outputs, notes, n_nextn = outputs_of(self.checkpoint, self.shape)
        self.notes += notes
        keys = model_keys(self.checkpoint.config, self.shape, self.notes)
        arch = self.shape.arch
        if n_nextn < self.shape.n_nextn:
            keys[f"{arch}.block_count"] = self.shape.n_layer + n_nextn
            del keys[f"{arch}.nextn_predict_layers"]
        self.keys = {"general.architecture": arch, "general.type": "model", "general.name": _name_of(self.checkpoint), **keys}
        self.keys |= {f"tokenizer.{key}": value for key, value in tokenizer_keys(self.checkpoint, self.shape, self.notes).items()}
        self.keys["tokenizer.ggml.token_type"] = np.array(self.keys["tokenizer.ggml.token_type"], np.int32)
        self.metadata = Metadata(self.keys, str(self.checkpoint.folder))
        self.config = architecture(self.metadata).Config.from_metadata(self.metadata, self.shape.n_vocab)
        Tokenizer.from_metadata(self.metadata, self.shape.n_vocab)      # refuses a vocabulary that cannot be used

    @property
    def n_params(self):
        """Parameters of the output, MTP blocks included."""
        return sum(math.prod(output.shape) for output in self.outputs)

    def infos(self, kind):
        """The TensorInfo of all outputs for a type of types.NAMES."""
        return types_of(self.outputs, self.metadata, kind)

    def layout(self, out, kind, split_max_bytes=None, split_max_tensors=None):
        """The Layout of the GGUF file, or files.

        Raises UnsupportedModelError for a type that needs an imatrix.
        """
        infos = self.infos(check_type(kind))
        check_importance(infos, check_type(kind))
        return Layout(out, self.keys | type_keys(check_type(kind)), infos, split_max_bytes, split_max_tensors)

    def describe(self, layout, kind):
        """What a conversion gives, a dict of JSON types; sizes are bytes."""
        types = collections.defaultdict(lambda: [0, 0])
        for info in layout.tensors:
            types[info.type][0] += 1
            types[info.type][1] += info.n_bytes
        return {
            "folder": str(self.checkpoint.folder), "name": self.keys["general.name"], "hf_architecture": self.shape.hf,
            "architecture": self.shape.arch, "n_params": self.n_params, "n_layer": self.shape.n_layer,
            "n_mtp_blocks": self.config.n_layer_nextn, "type": kind,
            "source_bytes": sum(stored.n_bytes for stored in self.checkpoint.tensors.values()),
            "tokenizer": self.keys["tokenizer.ggml.pre"], "n_tensors": len(layout.tensors), "n_bytes": layout.n_bytes,
            "parts": [{"path": str(part.path), "n_bytes": part.n_bytes, "n_tensors": len(part.tensors)} for part in layout.parts],
            "tensor_types": {name: {"tensors": n, "bytes": b} for name, (n, b) in sorted(types.items())}, "notes": self.notes}

    def memory(self, n_ctx=None, kv_type="i16", index_type=None):
        """What running each type takes, a dict of JSON types in bytes.

        weights: without MTP blocks, which are not run. caches: of one conversation of n_ctx tokens. needing_imatrix: types that `pydsa
        quantize` makes of another with an importance matrix.
        """
        n_ctx, = counts(2**31 - 1, n_ctx=n_ctx or min(DEFAULT_N_CTX, self.config.n_ctx_train))
        kv_type = choose_cache_type("kv_type", kv_type)
        index_type = choose_cache_type("index_type", index_type or ("f32" if kv_type == "f32" else "i8"))
        kinds = {"latents": kv_type, "index_keys": index_type}
        row = sum(cache_row_bytes(kinds[ref.kind], widths) for ref, widths in self.config.cache_widths.items())
        end, infos = f"blk.{self.shape.n_layer}.", {kind: self.infos(kind) for kind in NAMES}
        return {"n_ctx": n_ctx, "kv_type": kv_type, "index_type": index_type if self.config.top_k else None, "caches": n_ctx * row,
                "weights": {kind: sum(info.n_bytes for info in infos[kind] if not info.name.startswith(end)) for kind in NAMES},
                "needing_imatrix": [kind for kind in NAMES if wanting_importance(infos[kind], kind)]}


def _name_of(checkpoint):
    """The name of a model: its folder's, or in a cache of the hub its own."""
    folder = checkpoint.folder.absolute()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return os.fsencode(folder.name).decode(errors="replace") or "model"


def format_plan(plan):
    """The dict of Conversion.describe() as lines of text."""
    mtp = f" and {plan['n_mtp_blocks']} MTP block(s)" if plan["n_mtp_blocks"] else ""
    lines = [f"{plan['name']}: {plan['hf_architecture']} -> {plan['architecture']}, {count(plan['n_params'])} parameters, "
             f"{plan['n_layer']} layers{mtp}, {size(plan['source_bytes'])} in the folder", *(f"note: {note}" for note in plan["notes"]),
             f"{plan['type']}: {plan['n_tensors']} tensors, {size(plan['n_bytes'])} ({plan['n_bytes']} bytes) in "
             f"{len(plan.get('parts', '.'))} file(s); pre-tokenizer {plan['tokenizer']}"]
    lines += [f"  {name:6} {entry['tensors']:6}  {size(entry['bytes']):>10}" for name, entry in plan["tensor_types"].items()]
    return lines + [f"  {part['path']}  {part['n_tensors']} tensors, {size(part['n_bytes'])}" for part in plan.get("parts", ())]


def format_memory(memory):
    """The dict of Conversion.memory() as lines of text."""
    caches = f"latents {memory['kv_type']}" + (f", index keys {memory['index_type']}" if memory["index_type"] else "")
    lines = [f"memory by type: weights, and with caches of {size(memory['caches'])} for {memory['n_ctx']} tokens ({caches})"]
    for kind, n in memory["weights"].items():
        note = "  (of another type, by pydsa quantize with an importance matrix)" if kind in memory["needing_imatrix"] else ""
        lines.append(f"  {kind:9} {size(n):>12} {size(n + memory['caches']):>12}{note}")
    return lines
