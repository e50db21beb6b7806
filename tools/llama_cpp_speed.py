"""The speed of pydsa beside llama.cpp's.

For tools/compare_llama_cpp.py --speed. Both run the same tokens, alternating, and the best time of each counts.
"""

import platform
import re
from importlib.metadata import version
from pathlib import Path

import pydsa
from pydsa.bench import random_ids, reach_depth, test_name, time_test
from pydsa.words import size, threads


class LlamaSession:
    """A LlamaCpp with the methods of a Session that are timed.

    Only the last token of a batch gets logits.
    """

    def __init__(self, peer):
        self.api, self.context, self.n_past = peer.api, peer.context, 0
        self.memory = self.api.llama_get_memory(self.context)

    def truncate(self, n):
        if not self.api.llama_memory_seq_rm(self.memory, 0, n, -1):
            raise RuntimeError(f"llama.cpp cannot go back to {n} tokens of context.")
        self.n_past = n

    def prefill(self, ids):
        tokens = (self.api.llama_token * len(ids))(*map(int, ids))
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        self.api.llama_synchronize(self.context)
        self.n_past += len(ids)

    def decode(self, token):
        self.prefill([token])


def best_seconds(sessions, ids, test, repetitions):
    """The shortest time of each session for one test of a Bench.

    The sessions alternate. The first run of each is a warm-up.
    """
    n_prompt, n_gen, n_depth = test
    for session in sessions:
        reach_depth(session, ids, n_depth)
    seconds = [[] for _ in sessions]
    for _ in range(repetitions + 1):
        for session, mine in zip(sessions, seconds):
            session.truncate(n_depth)
            mine.append(time_test(session, ids[n_depth:], n_prompt, n_gen))
    return [min(mine[1:]) for mine in seconds]


def compare_speed(model, peer, bench):
    """Yield a row of the table for each test.

    It has the tokens per second of pydsa and of llama.cpp, and their ratio.
    """
    sessions, ids = (model.session(), LlamaSession(peer)), random_ids(model, bench.n_ctx)
    for test in bench.tests:
        ours, theirs = ((test[0] + test[1]) / seconds for seconds in best_seconds(sessions, ids, test, bench.repetitions))
        yield {"test": test_name(*test), "pydsa t/s": f"{ours:.2f}", "llama.cpp t/s": f"{theirs:.2f}", "ratio": f"{ours / theirs:.2f}"}


def conditions(model, repack):
    """One line: machine, versions, file, and what llama.cpp was allowed."""
    path, repacked = Path(model.metadata.path), "with" if repack else "without"
    return (f"{processor()}; {threads(model.threads, model.threads_batch)}; pydsa {pydsa.__version__}, numba {version('numba')}, "
            f"llama-cpp-python {version('llama_cpp_python')}; {path.name}, {size(model.setup.n_bytes)}, {model.setup.file_type}; "
            f"f16 caches, index keys of pydsa {model.index_type}, llama.cpp with flash attention and {repacked} "
            f"repacked weights (use_extra_bufts {'on' if repack else 'off'}).")


def processor():
    """The name of the CPU."""
    try:
        names = re.findall(r"^model name\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
