"""A split GGUF of which each machine has some parts: what they have in common, and tensors that lie elsewhere.

    here = described(path)                      # on each machine: what it has, of JSON's types
    parts = merged({"node a": ..., "node b": ...})      # what all have together; files that differ are refused
    file = open_gguf(path, absent_parts(path, parts))   # on each machine: the whole file, but for data that are elsewhere
"""
import collections
import hashlib
import os
import re
from pathlib import Path

import numpy as np

from pydsa.errors import GGUFError
from pydsa.gguf.file import GGML_TYPES, SPLIT_NAME, GGUFFile, Metadata, Tensor, open_parts, quote

END = 64            # bytes at each end of a tensor that are told: those of Setup.fingerprint
WHOLE = 4096        # bytes of a tensor that is told as a whole: factors of products are read where a graph is recorded
MOST_PARTS = 99999
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count", "general.alignment")
BLOCK = re.compile(r"blk\.([0-9]{1,9})\.")
BLOCK_BYTES = {kind.name: (kind.block, kind.n_bytes) for kind in GGML_TYPES.values()}


class AbsentData:
    """The bytes of a tensor that are on another machine.

    It has the shape, nbytes, views and slices of an array; whatever reads a byte raises GGUFError, which says `why`.
    """
    dtype, itemsize = np.dtype(np.uint8), 1

    def __init__(self, form, why):
        self._form, self._why = form, why       # form: an array of the shape, of one byte of memory
        self.shape, self.nbytes, self.size, self.ndim = form.shape, form.nbytes, form.size, form.ndim

    def reshape(self, *shape):
        """The same bytes in another shape."""
        return AbsentData(self._form.reshape(*shape), self._why)

    def __getitem__(self, key):
        return AbsentData(self._form[key], self._why)

    def __len__(self):
        return len(self._form)

    def __getattr__(self, name):
        if name.startswith("__") and not name.startswith("__array"):       # what copying and printing look for
            raise AttributeError(name)
        raise GGUFError(self._why)

    def __array__(self, *args, **options):
        raise GGUFError(self._why)

    def __iter__(self):
        raise GGUFError(self._why)


def described(path):
    """What this machine has of a GGUF, a dict of JSON's types.

    "count": the number of parts. "metadata": {key: a digest of its value}. "parts": {number, as a text: "n_bytes", "keys", "tensors"}; a
    tensor is [name, type, shape, its ends in hexadecimal]. Parts may be missing, but not the first. Raises the errors of open_gguf().
    """
    parts = open_parts(os.path.expanduser(path), range(2, MOST_PARTS + 1))
    metadata = parts[1].metadata
    return {"count": metadata.get("split.count", 1) or 1, "metadata": {key: _digest(value) for key, value in metadata.items()},
            "parts": {str(number): _described(part) for number, part in parts.items()}}


def _described(part):
    return {"n_bytes": part.n_bytes, "keys": {key: part.metadata[key] for key in SPLIT_KEYS if key in part.metadata},
            "tensors": [[t.name, t.type, list(t.shape), _ends(t).hex()] for t in part.tensors.values()]}


def _digest(value):
    kind, data = (str(value.dtype), value.tobytes()) if isinstance(value, np.ndarray) else (type(value).__name__, repr(value).encode())
    return hashlib.sha256(kind.encode() + data).hexdigest()[:16]


def _ends(tensor):
    data = tensor.data.reshape(-1)
    return data.tobytes() if data.nbytes <= WHOLE else data[:END].tobytes() + data[-END:].tobytes()


def merged(nodes):
    """What machines have together: {number, as a text: the part}, in order.

    nodes: {name: what described() returned there}. Raises GGUFError, which names the machine and what differs, for files that are not the
    same, and for parts that are on none of them.
    """
    (first, reference), *others = nodes.items()
    parts, owner = dict(reference["parts"]), dict.fromkeys(reference["parts"], first)
    for name, node in others:
        if node["count"] != reference["count"]:
            raise GGUFError(f"The model has {_parts(node['count'])} on {name}, and {_parts(reference['count'])} on {first}: put the same "
                            "files on all nodes.")
        key = _differing(node["metadata"], reference["metadata"])
        if key is not None:
            raise GGUFError(f"The metadata of the model's file differ: {quote(key)} is another on {name} than on {first}: put the same "
                            "files on all nodes.")
        for number, part in node["parts"].items():
            if number in parts:
                _compare(number, name, part, owner[number], parts[number])
            else:
                parts[number], owner[number] = part, name
    missing = [number for number in range(1, reference["count"] + 1) if str(number) not in parts]
    if missing:
        raise GGUFError(f"Part {', '.join(map(str, missing))} of the {reference['count']} parts of the model is on none of the nodes "
                        f"({', '.join(nodes)}): copy each part to the node of the stage that runs its layers.")
    return {str(number): parts[str(number)] for number in range(1, reference["count"] + 1)}


def _parts(n):
    return f"{n} part{'s' * (n != 1)}"


def _differing(a, b):
    """The first key with another value, or in one of two dicts only; or None."""
    return next((key for key in [*a, *b] if a.get(key) != b.get(key)), None)


def _compare(number, name, part, other, expected):
    """Raise GGUFError if a part differs from the one of another machine."""
    mine, theirs = ({tensor[0]: tensor for tensor in one["tensors"]} for one in (part, expected))
    for tensor in sorted(mine.keys() | theirs.keys()):
        where = f"in part {number} of the model tensor {quote(tensor)}"
        if tensor not in mine or tensor not in theirs:
            here, there = (name, other) if tensor in mine else (other, name)
            raise GGUFError(f"The files differ: {where} is on {here}, but not on {there}: put the same files on all nodes.")
        for what, a, b in zip(("type", "shape"), mine[tensor][1:], theirs[tensor][1:]):
            if a != b:
                raise GGUFError(f"The files differ: {where} has the {what} {a} on {name}, and {b} on {other}: put the same files on all "
                                "nodes.")
        if mine[tensor] != theirs[tensor]:
            raise GGUFError(f"The files differ: {where} has other bytes on {name} than on {other}: put the same files on all nodes.")
    if part != expected:        # the order of tensors, the keys or the length of the part
        raise GGUFError(f"The files differ: part {number} of the model is another on {name} ({part['n_bytes']} bytes) than on {other} "
                        f"({expected['n_bytes']} bytes): put the same files on all nodes.")


def is_complete(node):
    """Whether a machine has all parts, by what described() returned there."""
    return len(node["parts"]) == node["count"]


def layers_here(node, parts, n_layer, head):
    """The layers all of whose tensors a machine has, a set.

    The embedding counts to the first layer, the last norm and the output matrix to the layer `head`. node: what described() returned there.
    parts: what merged() returned.
    """
    names = [tensor[0] for part in parts.values() for tensor in part["tensors"]]
    embedding = {0} if "output.weight" in names else {0, head}      # else it is the output matrix too
    lacking = set()
    for number, part in parts.items():
        for name, *_ in part["tensors"] if number not in node["parts"] else ():
            block = BLOCK.match(name)
            lacking |= {int(block[1])} if block else embedding if name.startswith("token_embd.") else {head}
    return set(range(n_layer)) - lacking


def absent_parts(path, parts):
    """What stands for parts that are not here, as open_gguf() takes it.

    parts: what merged() returned. Tensors are AbsentData, but for small ones, which are told as a whole. Raises GGUFError for infos that
    cannot be those of a file.
    """
    path, found = Path(os.path.expanduser(path)), {}
    name = SPLIT_NAME.fullmatch(path.name)
    for number, part in parts.items():
        if number == "1" or name is None:       # a file that is not split is there
            continue
        place = path.with_name(f"{name[1]}-{int(number):05d}-of-{name[3]}.gguf")
        why = f"{place}: this part is not on this machine, expected it here for its tensors: copy it, or give its layers to another stage."
        tensors = {tensor[0]: _tensor(place, why, *tensor) for tensor in part["tensors"]}
        found[int(number)] = GGUFFile(Metadata(part["keys"], str(place)), tensors, [place], part["n_bytes"], 3, [list(tensors)],
                                      frozenset([place]))
    return found


def _tensor(place, why, name, kind, shape, ends):
    block, block_bytes = BLOCK_BYTES.get(kind, (0, 0))
    if not block or not shape or min(shape) < 1 or shape[-1] % block:
        raise GGUFError(f"{place}: tensor {quote(name)} is told to be {kind} {shape}, which no file has.")
    form = np.broadcast_to(np.zeros(1, np.uint8), (*shape[:-1], shape[-1] // block * block_bytes))
    data, expected = np.frombuffer(bytes.fromhex(ends), np.uint8), form.nbytes if form.nbytes <= WHOLE else 2 * END
    if data.nbytes != expected:
        raise GGUFError(f"{place}: tensor {quote(name)} is told with {data.nbytes} bytes, expected {expected}.")
    return Tensor(name, kind, tuple(shape), Ends(form, why, data.tobytes()) if form.nbytes > WHOLE else data.reshape(form.shape))


class Ends(AbsentData):
    """AbsentData of which the first and the last 64 bytes are known."""

    def __init__(self, form, why, ends):
        super().__init__(form, why)
        self.ends = ends


def ends_of(tensor):
    """The first and the last 64 bytes of a tensor, one after the other.

    Those of a shorter one are its bytes twice.
    """
    if isinstance(tensor.data, Ends):
        return tensor.data.ends
    data = tensor.data.reshape(-1)
    return data[:END].tobytes() + data[-END:].tobytes()


def check_here(file, tensors):
    """Raise GGUFError for tensors whose bytes are needed but are elsewhere.

    tensors: {name: Tensor} that a graph uses.
    """
    if not file.absent:
        return
    places = {name: path for path, names in zip(file.paths, file.part_names) if path in file.absent for name in names}
    needed = collections.Counter(places[source] for tensor in tensors.values() if (source := tensor.made_of or tensor.name) in places)
    if needed:
        path, n = next(iter(needed.items()))
        more = f", and so it is with {len(needed) - 1} more" if len(needed) > 1 else ""
        raise GGUFError(f"{path}: this part is not on this machine, but has {n} tensors of the layers that shall run here{more}: copy what "
                        "lacks, or give these layers to another stage.")
