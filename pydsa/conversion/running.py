"""Convert a folder of Hugging Face to GGUF, a piece of a tensor at a time.

Pieces are read, scaled and checked in threads; the one thread that writes takes them in order, so that only so many pieces as there are
threads, and two more, are in memory.
"""
import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pydsa.conversion.plan import Conversion
from pydsa.conversion.types import check_type
from pydsa.errors import CheckpointError, PydsaError
from pydsa.gguf.file import quote
from pydsa.gguf.writer import GGUFWriter
from pydsa.machine.cores import physical_cores

MOST_THREADS = 8
LARGEST_HALF = 65504


def convert(folder, out, type="Q8_0", *, split_max_bytes=None, split_max_tensors=None, overwrite=False, dry_run=False, progress=None):
    """Convert a folder of Hugging Face to GGUF -> a dict, what was written.

    folder: with config.json, safetensors files and the tokenizer. out: the file to write; with split_max_bytes or split_max_tensors, where
    the name of the parts comes from. type: of the matrices, one of pydsa.conversion.TYPES. overwrite: whether out may be replaced.
    dry_run: check all but the weights, and write nothing. progress(done, total, name): called with bytes.

    The dict is Conversion.describe(), and "resumed", the bytes that an interrupted run had written. Raises CheckpointError or
    UnsupportedModelError for a folder that cannot be converted, TargetError for a file that cannot be written.
    """
    kind = check_type(type)
    conversion = Conversion(folder)
    layout = conversion.layout(out, kind, split_max_bytes, split_max_tensors)
    return run(conversion, layout, kind, overwrite, dry_run, progress)


def run(conversion, layout, kind, overwrite=False, dry_run=False, progress=None):
    """Write what a Conversion makes, by its layout -> the dict of convert()."""
    report, inputs = conversion.describe(layout, kind), conversion.checkpoint.inputs
    report |= {"resumed": 0, "dry_run": bool(dry_run)}
    layout.check(overwrite, inputs)
    if dry_run:
        return report
    _check_scales(conversion.outputs)
    show = progress or (lambda done, total, name: None)
    with GGUFWriter(layout, conversion.checkpoint.source(), overwrite, inputs, show) as writer:
        report["resumed"] = writer.resumed
        if writer.restarted:
            report["notes"] = [*report["notes"], writer.restarted]
        outputs = {output.name: output for output in conversion.outputs}
        with ThreadPoolExecutor(min(physical_cores(), MOST_THREADS)) as pool:
            for info in list(writer.remaining):
                writer.write(info, _encoded(pool, outputs[info.name], info.type))
    return report


def _check_scales(outputs):
    """Raise CheckpointError for scales that are not finite."""
    for weight in {id(part): part for output in outputs for part in output.parts}.values():
        weight.check_scales()


def _encoded(pool, output, kind):
    """Yield the bytes of an Output's pieces, in order."""
    encode, jobs, pieces = encoder(kind), collections.deque(), iter(output.pieces)
    n_ahead = pool._max_workers + 1
    try:
        while True:
            while len(jobs) < n_ahead and (piece := next(pieces, None)) is not None:
                jobs.append(pool.submit(_checked, piece, output))
            if not jobs:
                return
            yield encode(jobs.popleft().result(), output)
    finally:
        for job in jobs:
            job.cancel()


def _checked(piece, output):
    """The values of a piece, which must be finite."""
    values = piece()
    if not np.isfinite(values).all():
        part = next((part for part in output.parts if not _finite(part)), output.parts[0])
        raise CheckpointError(f"{part.path}: {quote(part.name)} has weights that are NaN or infinite, expected numbers: the file "
                              "is damaged, get it again.")
    return values


def _finite(part):
    return all(np.isfinite(part.read(row, row + 1)).all() for row in range(part.shape[0])) if len(part.shape) > 1 else (
        np.isfinite(part.read()).all())


def encoder(kind):
    """A function (float32 [n, k], Output) -> the blocks of a GGML type."""
    if kind in ENCODERS:
        return ENCODERS[kind]
    from pydsa.quantization import TYPES
    return lambda values, output: TYPES[kind](values)


def _to_f16(values, output):
    if np.abs(values).max(initial=0) > LARGEST_HALF:
        raise PydsaError(f"{quote(output.name)} has weights above {LARGEST_HALF}, which F16 does not hold; use BF16.")
    return values.astype("<f2")


def _to_bf16(values, output):
    """Rounded to the nearest, of two the even one."""
    bits = np.ascontiguousarray(values, np.float32).view("<u4")
    return ((bits + (bits >> 16 & 1) + 0x7FFF) >> 16).astype("<u2")


ENCODERS = {"F32": lambda values, output: values, "F16": _to_f16, "BF16": _to_bf16}
