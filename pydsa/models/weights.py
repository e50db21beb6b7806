"""Weights: the tensors of a file by name.

Each is checked for its shape and type where the model asks for it.
"""
import numpy as np

from pydsa.errors import GGUFError, UnsupportedModelError
from pydsa.quants import SUPPORTED


class Weights:
    """The tensors of a file by name, with checks.

    weights("blk.0.attn_q_a.weight", q_lora, n_embd) returns the Tensor of that numpy shape. It raises GGUFError if there is none, and
    UnsupportedModelError if pydsa does not support its type. `used` has all tensors that were asked for, by name.
    """

    def __init__(self, file, prefix="", used=None, read=None):
        self._file, self._prefix = file, prefix
        self.used = {} if used is None else used
        self.read = set() if read is None else read     # names in the file, also of tensors that are used in another form

    @property
    def path(self):
        """The path of the file, for error messages."""
        return self._file.metadata.path

    def layer(self, il):
        """The Weights of one layer, with names without "blk.N."."""
        return Weights(self._file, f"blk.{il}.", self.used, self.read)

    def has(self, name):
        """Whether the file has a tensor with this name."""
        return self._prefix + name in self._file.tensors

    def shape(self, name):
        """The shape of a tensor as the file has it; None without the tensor."""
        return self._file.tensors[self._prefix + name].shape if self.has(name) else None

    def __call__(self, name, *shape):
        tensor = self.find(name, *shape)
        self.used[tensor.name] = tensor
        return tensor

    def find(self, name, *shape):
        """The Tensor as the file has it, for derive(); the same checks."""
        name = self._prefix + name
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{self.path}: tensor {name!r} is missing, expected one of shape {list(shape)} by the metadata.")
        if tensor.shape != shape:
            raise GGUFError(f"{self.path}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by the metadata.")
        if tensor.type not in SUPPORTED:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} is stored as {tensor.type}, expected one of {', '.join(SUPPORTED)}.")
        self.read.add(name)
        return tensor

    def factor(self, name):
        """The factor of the products with a matrix, a float; None without one.

        It stands beside the matrix `name`.weight as `name`.scale or `name`.weight.scale, one F32 value: matrices of NVFP4 have it.
        """
        name = self._companion(name)
        if name is None:
            return None
        value = float(self._values(self.find(name, 1))[0])
        return None if value == 1 else value

    def factors(self, name, n_expert):
        """The factors of the experts' matrices, a Tensor [n_expert], as factor()."""
        name = self._companion(name)
        if name is None:
            return None
        self._values(self.find(name, n_expert))
        return self(name, n_expert)

    def _companion(self, name):
        return next((name + end for end in (".scale", ".weight.scale") if self.has(name + end)), None)

    def _values(self, tensor):
        """The values of a small F32 tensor, which must be finite."""
        if tensor.type != "F32":
            raise UnsupportedModelError(f"{self.path}: tensor {tensor.name!r} is stored as {tensor.type}, expected F32.")
        values = tensor.data.view("<f4")
        if not np.isfinite(values).all():
            raise GGUFError(f"{self.path}: tensor {tensor.name!r} has values that are not finite, expected factors: the file is damaged.")
        return values

    def derive(self, name, tensor, shape, data, make=None):
        """A Tensor of this name, made of another one's bytes (models/stored.py).

        It has its type. data, make: as in Tensor.
        """
        name = self._prefix + name
        if name not in self.used:       # one for all graphs, so that bytes are made once
            self.used[name] = tensor._replace(name=name, shape=shape, data=data, make=make, made_of=tensor.name)
        return self.used[name]
