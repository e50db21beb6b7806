"""Write GGUF files tensor by tensor: in bounded memory, split, resumable.

    layout = Layout("model.gguf", {"general.architecture": "deepseek32", ...}, [TensorInfo("output.weight", "Q8_0", (512, 256)), ...])
    layout.check()                                  # what is at the path, and space on the disk, before anything is written
    with GGUFWriter(layout, source="what the bytes are made of") as writer:
        for info in list(writer.remaining):         # those that an earlier, interrupted run has not written
            writer.write(info, chunks)              # arrays of its bytes, in order

The files have `.partial` behind their names until all are complete; then they are renamed, the first part last. A journal beside them
lists the tensors that are written, with digests: a writer with the same layout and source goes on behind those whose bytes are right.
"""
import contextlib
import hashlib
import json
import os

import numpy as np

from pydsa.errors import PydsaError, TargetError
from pydsa.gguf.layout import pad

PIECE = 1 << 23             # bytes that are read at a time where written tensors are checked


class GGUFWriter:
    """A context that writes the tensors of a Layout, in its order.

    source: a text that changes whenever the bytes would; with another one, an interrupted run starts again. overwrite: whether files that
    are there may be replaced. inputs: as for Layout.check. progress(done, total, name): called with bytes, also while the tensors of an
    earlier run are checked.

    remaining: list of the TensorInfo that are still to be written. resumed: bytes of tensors that an earlier run has written.
    restarted: why what an earlier run has written is of no use, a sentence, or None.

    At the end the files get their names. What an exception leaves: nothing after a PydsaError, as the same run would meet it again, unless
    its class has keeps_output; the partial files and the journal after anything else, such as Ctrl-C, or a disk that is full.
    """

    def __init__(self, layout, source="", overwrite=False, inputs=(), progress=lambda done, total, name: None):
        layout.check(overwrite, inputs)
        self.layout, self._progress, self._source = layout, progress, source
        self._file, self._part, self._begun, self._keep = None, -1, set(), False
        self._done, self.resumed, self.restarted, self.remaining = 0, 0, None, list(layout.tensors)
        self._places = {info.name: (i, start) for i, part in enumerate(layout.parts) for info, start in zip(part.tensors, part.starts)}

    def __enter__(self):
        try:
            self._journal = open(self.layout.journal, "a+b")
            try:
                _lock(self._journal, self.layout.path)
                self._resume()
            except BaseException:
                self._journal.close()
                raise
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, kind, error, trace):
        complete = kind is None and not self.remaining
        try:
            self._close_part(sync=complete)
            if complete:
                for part in reversed(self.layout.parts):     # the first part last: who finds it finds all
                    os.replace(part.partial, part.path)
        except OSError as failure:
            self._keep, error = True, self._failed(failure)
            raise error from failure
        finally:
            self._journal.close()
            refused = isinstance(error, PydsaError) and not getattr(error, "keeps_output", False)
            if not self._keep and (complete or refused):
                _remove([*(part.partial for part in self.layout.parts), self.layout.journal])
        if kind is None and not complete:
            raise ValueError(f"{self.remaining[0].name} is not written")

    def write(self, info, chunks):
        """Write the next tensor of `remaining`, from arrays of its bytes.

        chunks: an iterable of arrays of any dtype. Raises TargetError if the disk refuses them.
        """
        if not self.remaining or info != self.remaining[0]:
            raise ValueError(f"{info.name} is not the next tensor")
        digest, n, (index, start) = hashlib.blake2b(digest_size=16), 0, self._places[info.name]
        self._on_disk(self._open_part, index)
        for chunk in chunks:
            data = memoryview(np.ascontiguousarray(chunk)).cast("B")
            n += len(data)
            if n > info.n_bytes:
                break
            digest.update(data)
            self._on_disk(self._file.write, data)
            self._progress(self._done + n, self.layout.n_bytes, info.name)
        if n != info.n_bytes:
            raise ValueError(f"{info.name} has {n} bytes, expected {info.n_bytes}")
        self._on_disk(self._file.write, bytes(pad(start + n, self.layout.alignment) - start - n))
        self._on_disk(self._file.flush)
        self._on_disk(self._note, [info.name, digest.hexdigest()])
        self._done += info.n_bytes
        del self.remaining[0]

    def _on_disk(self, function, *args):
        """Call a function that writes."""
        try:
            return function(*args)
        except OSError as error:
            self._keep = True
            raise self._failed(error) from error

    def _failed(self, error):
        kept = "; what is written is kept, and the same command goes on with it" if self._keep else ""
        return TargetError(f"{self.layout.path}: the file cannot be written ({error.strerror or error}){kept}.")

    def _open_part(self, index):
        """Make a part the one that is written, at the end of its last tensor."""
        if index != self._part:
            self._close_part(sync=True)
            part = self.layout.parts[index]
            self._file, self._part = open(part.partial, "r+b" if index in self._begun else "wb"), index
            if index not in self._begun:
                self._file.write(part.header)
                self._begun.add(index)
        self._file.seek(self._places[self.remaining[0].name][1])

    def _close_part(self, sync):
        if self._file is not None:
            file, self._file, self._part = self._file, None, -1
            with file:
                file.flush()
                if sync:
                    os.fsync(file.fileno())

    def _note(self, entry):
        """Append a line to the journal."""
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()

    def _resume(self):
        """Find what an earlier run has written, or begin a new journal."""
        begun, entries = _entries(self._journal)
        mine = {"fingerprint": self.layout.fingerprint(self._source), "parts": [part.partial.name for part in self.layout.parts]}
        if begun and begun.get("fingerprint") == mine["fingerprint"]:
            good = list(self._checked(entries))
        else:
            good = []
            if begun:
                self.restarted = (f"What an interrupted run had written of {self.layout.path} is of no use, as its options or its source "
                                  "were others: this run starts again.")
                names = [name for name in begun.get("parts", ()) if isinstance(name, str) and name.endswith(".partial")]
                _remove(self.layout.path.with_name(os.path.basename(name)) for name in names)
        self._journal.truncate(0)
        for entry in [mine, *good]:
            self._note(entry)
        del self.remaining[:len(good)]
        self.resumed = self._done

    def _checked(self, entries):
        """Yield the entries of tensors whose bytes are those of the digest."""
        for info, entry in zip(self.layout.tensors, entries):
            index, start = self._places[info.name]
            part = self.layout.parts[index]
            try:
                with open(part.partial, "rb") as file:
                    if index not in self._begun and file.read(len(part.header)) != part.header:
                        return
                    file.seek(start)
                    digest = self._digest(file, info)
                    padding = bytes(pad(start + info.n_bytes, self.layout.alignment) - start - info.n_bytes)
                    if entry != [info.name, digest] or file.read(len(padding)) != padding:
                        return
            except FileNotFoundError:
                return
            self._begun.add(index)
            self._done += info.n_bytes
            yield entry

    def _digest(self, file, info):
        digest, left = hashlib.blake2b(digest_size=16), info.n_bytes
        while data := file.read(min(PIECE, left)):
            digest.update(data)
            left -= len(data)
            self._progress(self._done + info.n_bytes - left, self.layout.n_bytes, f"{info.name} is there")
        return digest.hexdigest()


def _entries(journal):
    """The first line of a journal and the others; None for an empty one.

    What an interruption or damage has left of a line ends them.
    """
    journal.seek(0)
    lines = []
    with contextlib.suppress(ValueError):
        for line in journal:
            lines.append(json.loads(line))
    return (lines[0] if isinstance(lines[0], dict) else {}, lines[1:]) if lines else (None, [])


def _remove(paths):
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(file, path):
    """Keep other processes from the same output, where the system can."""
    try:
        import fcntl
    except ImportError:     # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetError(f"{path}: another process is writing this file; wait for it, or give another name.") from None
    except OSError:         # a file system without locks
        return
