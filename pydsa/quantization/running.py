"""Quantize a GGUF file: from the types of its tensors to others, a tensor at a time."""
import hashlib
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass, field

from pydsa.backends.devices import check_numba, watch_maps
from pydsa.errors import PydsaError, TargetError
from pydsa.gguf.file import I64, SCALARS, open_gguf, quote
from pydsa.gguf.layout import Layout, Packed, TensorInfo, pack, packed_metadata
from pydsa.gguf.override import ARCHITECTURE, override
from pydsa.gguf.writer import GGUFWriter
from pydsa.machine import maps
from pydsa.quantization.choice import BITS, COPY, Choice, checked_patterns, choose, file_type, tensor_type, wants_importance
from pydsa.quantization.mixes import MIXES
from pydsa.quants import TYPES

PIECE = 1 << 26     # bytes of a tensor that is copied
MOST_TEXT = 127     # bytes of a text that llama-quantize stores in the metadata
EXACT_ENOUGH = ("F32", "F16", "BF16", "Q8_0")       # may be quantized without being asked: Q8_0's NMSE is a hundredth of Q4_K's


@dataclass
class Row:
    """What became of a tensor.

    nmse: the normalised squared error of its new values against the old ones, 0 where it is copied. weighted: the same with the importance
    of columns. Both are None where they are not known: in a dry run, and for tensors that an interrupted run has written.
    """
    tensor: str
    shape: tuple
    source: str
    type: str
    bytes_in: int
    bytes_out: int
    nmse: float | None = None
    weighted: float | None = None


@dataclass
class Report:
    """A quantized file: a Row for each tensor, in the order of the file.

    paths: the files that were written, or would be. wanting: tensors whose type needs an imatrix that is not there (only in a dry run).
    without_data: tensors that change their type and have no data in the imatrix that is given. resumed: bytes that an interrupted run had
    written. restarted: why these are of no use, a sentence, or None. refused: why the files could not be written, a sentence, or None (only
    in a dry run).
    """
    type: str
    rows: list = field(default_factory=list)
    paths: list = field(default_factory=list)
    wanting: list = field(default_factory=list)
    without_data: list = field(default_factory=list)
    resumed: int = 0
    restarted: str | None = None
    refused: str | None = None

    @property
    def bytes_in(self):
        """Bytes of the tensors as they were."""
        return sum(row.bytes_in for row in self.rows)

    @property
    def bytes_out(self):
        """Bytes of the tensors as they are."""
        return sum(row.bytes_out for row in self.rows)

    @property
    def bits(self):
        """Bits of a weight, on average."""
        return 8 * self.bytes_out / max(1, sum(math.prod(row.shape) for row in self.rows))


def quantize(path_in, path_out, type, *, imatrix=None, tensor_types=(), keep_indexer=True, leave_output_tensor=False,
             output_tensor_type=None, token_embedding_type=None, pure=False, allow_requantize=False, override_kv=None,
             split_max_bytes=None, threads=None, overwrite=False, dry_run=False, progress=lambda done, total, name: None,
             compiling=None):
    """Quantize a GGUF file, or the parts of a split one -> Report.

    type: a file type of llama-quantize, such as "Q4_K_M", or "COPY". imatrix: the path of an imatrix, GGUF or .dat. tensor_types: pairs of
    a regular expression and a type, or a dict. keep_indexer: indexer matrices stay Q8_0 or better. leave_output_tensor, output_tensor_type,
    token_embedding_type, pure: as llama-quantize has them. allow_requantize: take tensors of less than Q8_0 as a source, too.
    override_kv: {key: value} of the metadata. split_max_bytes: of the tensors of a part. threads: all cores by default. overwrite: replace
    files that are there. dry_run: types and sizes only. progress(done, total, name): bytes. compiling: the same for kernels.

    The output gets its name when it is complete. An interrupted run goes on where it was. Memory: some hundred MB, whatever the size.
    Raises PydsaError, and leaves nothing behind then.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise PydsaError(f"threads is {threads!r}, expected a number from 1 on, or None for all cores.")
    choice = Choice(checked_patterns(tensor_types), keep_indexer, leave_output_tensor,
                    None if output_tensor_type is None else tensor_type(output_tensor_type, "--output-tensor-type"),
                    None if token_embedding_type is None else tensor_type(token_embedding_type, "--token-embedding-type"), pure)
    kind = file_type(type)
    if kind == COPY:
        _check_copy(choice, imatrix)
    job = _Job(path_in, kind, choice, imatrix, override_kv or {})
    layout = Layout(path_out, job.metadata(), [TensorInfo(row.tensor, row.type, row.shape) for row in job.report.rows], split_max_bytes)
    job.report.paths = [part.path for part in layout.parts]
    job.check(allow_requantize, dry_run)
    if dry_run:
        try:
            layout.check(overwrite, job.inputs)
        except TargetError as error:
            job.report.refused = str(error)
        return job.report
    with GGUFWriter(layout, job.source(), overwrite, job.inputs, progress) as writer:
        job.write(writer, threads, compiling)
    return job.report


def _check_copy(choice, imatrix):
    """Raise PydsaError for options that would do nothing."""
    options = {"--tensor-type": choice.tensor_types, "--output-tensor-type": choice.output, "--token-embedding-type": choice.embedding,
               "--pure": choice.pure, "--imatrix": imatrix is not None}
    idle = next((option for option, given in options.items() if given), None)
    if idle:
        raise PydsaError(f"COPY leaves all tensors as they are, but {idle} is given: leave one of them out.")


class _Job:
    """An open file, and what is to become of it."""

    def __init__(self, path, kind, choice, imatrix, overrides):
        self.file, self.kind, self.choice, self._overrides, self._imatrix_path = open_gguf(path), kind, choice, overrides, imatrix
        self._overridden = override(self.file.metadata, overrides)
        self._imatrix = self._importance = None
        if imatrix is not None:
            from pydsa.imatrix import read
            self._imatrix = read(imatrix)
            self._importance = self._imatrix.for_model(self.file.tensors, str(path))
        types = choose(self._overridden, self.file.tensors, kind, choice, imatrix is not None)
        self.report = Report(kind, [_row(tensor, types[tensor.name]) for tensor in self.file.tensors.values()])

    @property
    def inputs(self):
        """Paths of the files that are read."""
        return [*self.file.paths, *([] if self._imatrix_path is None else [self._imatrix_path])]

    def metadata(self):
        """The metadata of the output, {key: value or Packed}."""
        pairs, old = packed_metadata(self.file.paths[0]), self.file.metadata.get(ARCHITECTURE)
        new = self._overridden.get(ARCHITECTURE)
        if new != old:
            pairs = {new + key.removeprefix(old) if key.startswith(f"{old}.") else key: value for key, value in pairs.items()}
        if self.kind != COPY:
            pairs["general.quantization_version"], pairs["general.file_type"] = 2, MIXES[self.kind].file_type
        if self._imatrix is not None:
            pairs["quantize.imatrix.file"] = _short(os.fspath(self._imatrix_path))
            if self._imatrix.datasets:
                pairs["quantize.imatrix.dataset"] = _short(self._imatrix.datasets[0])
            pairs["quantize.imatrix.entries_count"] = len(self._imatrix.sums)
            pairs["quantize.imatrix.chunks_count"] = self._imatrix.chunks
        for key, value in self._overrides.items():
            pairs[key] = _packed(key, value, pairs.get(key))
        return pairs

    def check(self, allow_requantize, dry_run):
        """Raise PydsaError for types that cannot, or should not, be made."""
        changed = [row for row in self.report.rows if row.source != row.type]
        for row in changed:
            if row.source not in EXACT_ENOUGH and not allow_requantize:
                n = sum(other.source not in EXACT_ENOUGH for other in changed)
                raise PydsaError(f"{self.file.paths[0]}: {quote(row.tensor)} and {n - 1} more tensors are quantized to {row.source} or so "
                                 "already, and lose more than from an unquantized file or from Q8_0: get one of these, or give "
                                 "--allow-requantize.")
        have = self._importance or {}
        if self._imatrix is not None:
            self.report.without_data = [row.tensor for row in changed if row.tensor not in have]
        self.report.wanting = [
            row.tensor for row in changed if row.tensor not in have and wants_importance(row.tensor, row.type, self.kind)]
        if self.report.wanting and not dry_run:
            name = self.report.wanting[0]
            kind = next(row.type for row in changed if row.tensor == name)
            said = "the imatrix has no data of it" if have else "there is none: make one with pydsa imatrix, and give it with --imatrix"
            raise PydsaError(f"{quote(name)} would become {kind}, which is of no use without an imatrix, and {said}.")

    def source(self):
        """What the output's bytes are made of, as a text that tells changes."""
        parts = [f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}" for path in self.file.paths]
        digest = hashlib.blake2b(digest_size=16)
        for name, values in sorted((self._importance or {}).items()):
            digest.update(name.encode() + values.tobytes())
        return "\n".join(["quantize 1", *parts, digest.hexdigest()])

    def write(self, writer, threads, compiling):
        """Write the tensors that are missing, and note their errors."""
        self.report.resumed, self.report.restarted = writer.resumed, writer.restarted
        watch_maps()
        missing, rows = {info.name for info in writer.remaining}, {row.tensor: row for row in self.report.rows}
        pairs = {(row.source, row.type) for row in self.report.rows if row.source != row.type and row.tensor in missing}
        if not pairs:
            for info in list(writer.remaining):
                writer.write(info, self._intact(self._copied(info.name)))
            return
        check_numba()
        from pydsa.quantization import rows as threading
        from pydsa.quantization.tensors import Requantized, compile_for
        compile_for(pairs, compiling)
        with threading.threads(threads):
            for info in list(writer.remaining):
                row = rows[info.name]
                if row.source == row.type:
                    writer.write(info, self._intact(self._copied(info.name)))
                    continue
                tensor = Requantized(self.file.tensors[info.name], row.type, (self._importance or {}).get(info.name))
                writer.write(info, self._intact(tensor.pieces()))
                row.nmse, row.weighted = tensor.errors

    def _intact(self, pieces):
        """The same pieces; then LostFileError if the file could not be read."""
        yield from pieces
        maps.check(self.file.maps)

    def _copied(self, name):
        """Yield the bytes of a tensor in pieces."""
        data = self.file.tensors[name].data.reshape(-1)
        for start in range(0, data.size, PIECE):
            yield data[start:start + PIECE].copy()      # whoever writes it must not meet what the file has lost


def _row(tensor, kind):
    """The Row of a tensor that becomes one of a type."""
    n_bytes = tensor.data.size if kind == tensor.type else math.prod(tensor.shape) // TYPES[kind].size * TYPES[kind].n_bytes
    error = 0.0 if kind == tensor.type else None
    return Row(tensor.name, tensor.shape, tensor.type, kind, tensor.data.size, n_bytes, error)


def _packed(key, value, stored):
    """A value of the metadata as Packed, in place of a stored one or None.

    A number has the type of the one that it replaces. Raises PydsaError if it is too large for that.
    """
    kind = I64 if type(value) is int and not 0 <= value < 2**32 else None
    if isinstance(stored, Packed) and stored.type_id in SCALARS and type(value) in (int, float):
        kind = stored.type_id
    try:
        return pack(value, kind)
    except (struct.error, OverflowError):
        raise PydsaError(f"The override of {quote(key)} is {value}, which the type of this number in the file cannot hold.") from None


def _short(text):
    """A text that llama-quantize would store whole.

    The bytes of a file's name may be no text.
    """
    return text.encode(errors="replace")[:MOST_TEXT].decode(errors="ignore")


def summary(report):
    """Lines of text: how many tensors of each type, and the sizes."""
    counts = Counter((row.source, row.type) for row in report.rows)
    lines = [f"{n} tensors {source} -> {kind}" if source != kind else f"{n} tensors {kind}, as they are"
             for (source, kind), n in sorted(counts.items(), key=lambda item: -BITS[item[0][1]])]
    return [*lines, f"{report.bytes_in / 1e6:,.1f} MB -> {report.bytes_out / 1e6:,.1f} MB, {report.bits:.2f} bits a weight"]
