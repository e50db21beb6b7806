"""Saves: the rows of conversations in files of the stages, so that one that is started again has less to compute.

Every few seconds each stage appends the rows of new tokens to logs in a folder of its machine (saved/log.py). A save counts when all
stages have theirs, and then for all conversations at once.
"""
import os
import re
import secrets
import tempfile
import threading
import time
import warnings

from pydsa.errors import PydsaError, SessionFileError
from pydsa.saved.log import SessionLog, log_path
from pydsa.stages.wire import FrameError

REMOVING = 2.0      # seconds in which stages remove what they have saved, at the end
EVERY = 2.0         # seconds between two saves, at least


class Saves:
    """Saves the conversations of a Pipeline on the stages' machines.

    folder: where; it is made where it is not there. None: nothing is saved. A UserWarning tells of a save that fails, once for each reason.
    Raises PydsaError if this machine cannot write to the folder.
    """

    def __init__(self, pipeline, folder):
        self._pipeline, self._told, self._stopped, self.folder, self._where = pipeline, set(), threading.Event(), None, None
        if folder is not None:
            self.folder = made(folder)
            self._where = {"folder": self.folder, "run": secrets.token_hex(8)}

    def start(self):
        """Begin to save."""
        if self._where is not None:
            threading.Thread(target=self._run, name="pydsa saves sessions", daemon=True).start()

    def stop(self):
        """Save no more, and let the stages remove what they have saved."""
        self._stopped.set()
        pipeline, until = self._pipeline, time.monotonic() + REMOVING
        if self._where is not None:
            for waiter in [pipeline.links.ask(i, {"do": "unlog"}) for i in range(len(pipeline.launcher.stages))]:
                waiter.done.wait(max(0.0, until - time.monotonic()))

    def _run(self):
        while not self._stopped.wait(EVERY):
            if self._pipeline.error is None and self._pipeline.journal.changed:
                self.save()

    def save(self):
        """Save what is new -> whether that is done."""
        pipeline = self._pipeline
        with pipeline.changed:
            mark = pipeline.journal.mark()
        try:
            pipeline.ask_each([(i, {"do": "log", "session": session, "start": start, "ids": ids} | self._where)
                               for session, (start, ids) in mark.rows.items() for i in range(len(pipeline.launcher.stages))])
        except PydsaError as error:
            with pipeline.changed:
                pipeline.journal.give_up()
            self._warn(f"conversations are not saved, and would be run again from their beginning: {error}")
            return False
        with pipeline.changed:
            pipeline.journal.commit(mark)
        return True

    def restore(self, ask):
        """Give all stages the rows of the last save -> whether they have them.

        ask(stage, content, payload) asks a stage.
        """
        if self._where is None:
            return False
        pipeline = self._pipeline
        needed = pipeline.journal.needed(set(pipeline.conversations))
        try:
            for session, n in needed.items():
                for i in range(len(pipeline.launcher.stages)):
                    if ask(i, {"do": "logged", "session": session} | self._where, b"")[0]["n"] < n:
                        raise SessionFileError(f"{pipeline.links.name(i)} has not the rows of all tokens.")
        except SessionFileError as error:
            with pipeline.changed:
                pipeline.journal.give_up()
            self._warn(f"a save cannot be read, and conversations are run again from their beginning: {error}")
            return False
        return bool(needed)

    def _warn(self, text):
        if self._pipeline.error is None and text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=3)


def made(name):
    """Make the folder of `resume` -> its absolute path.

    Raises PydsaError if nothing can be written there.
    """
    folder = os.path.abspath(os.path.expanduser(name))
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PydsaError(f"resume is {os.fspath(name)!r}, a folder that cannot be written to ({reason}): name another one.") from error
    return folder


class Logs:
    """The logs of a stage.Stage's sessions."""

    def __init__(self, stage):
        self._stage, self._logs = stage, {}

    def _log(self, number, content):
        folder, run = content.get("folder"), content.get("run")
        if not isinstance(folder, str) or not isinstance(run, str) or not re.fullmatch("[0-9a-f]{16}", run):
            raise FrameError("a stage is asked for the log of a session that is nowhere")
        if number not in self._logs:
            setup = self._stage.setup
            identity = {"model": setup.fingerprint, "run": run, "session": number}
            path = log_path(folder, run, number, (setup.layers.start, setup.layers.stop))
            self._logs[number] = SessionLog(path, identity, self._stage.caches(number))
        return self._logs[number]

    def append(self, number, content):
        """Append the rows of a session's new tokens, unless it has ended."""
        start, ids = content.get("start"), content.get("ids")
        if not isinstance(start, int) or start < 0 or not isinstance(ids, list) or not all(type(id) is int for id in ids):
            raise FrameError("a stage is asked to save tokens that are none")
        if number in self._stage.sessions:
            self._log(number, content).append(start, ids)

    def restore(self, number, content):
        """Overwrite the caches of a session by what is saved.

        Returns the number of its tokens.
        """
        log = self._log(number, content)
        log.restore()
        return len(log.tokens)

    def close(self, number):
        """Remove the log of a session that has ended."""
        log = self._logs.pop(number, None)
        if log is not None:
            log.remove()

    def close_all(self):
        """Remove all logs."""
        for number in list(self._logs):
            self.close(number)
