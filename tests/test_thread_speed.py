"""tools/thread_speed.py: threads that are used, rows, and what a run leaves."""
import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from tools import thread_speed as tool
from tools.make_model import ModelSpec, make_model
from tools.thread_speed import main, with_speed_ups


class Peer:
    """A LlamaSession that does nothing, and notes its threads."""

    def __init__(self):
        self.n_past, self.threads, self.context = 0, [], "context"
        self.api = SimpleNamespace(llama_set_n_threads=lambda context, n, batch: self.threads.append((context, n, batch)))

    def truncate(self, n):
        self.n_past = n

    def prefill(self, ids):
        self.n_past += len(ids)

    def decode(self, token):
        self.prefill([token])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("threads") / "model.gguf", ModelSpec(n_layer=2, n_layer_dense=1))


@pytest.fixture
def used(monkeypatch):
    """Four cores, and the numbers of threads that pydsa's steps were given."""
    from pydsa.backends import cpu
    numbers, given = [], cpu.set_threads
    monkeypatch.setattr(cpu, "set_threads", lambda n: (numbers.append(n), given(min(n, 2))))
    monkeypatch.setattr("pydsa.machine.cores.physical_cores", lambda: 4)
    return numbers


def run(monkeypatch, model, peer, *args):
    monkeypatch.setattr(tool, "opened_peer", lambda path, n_ctx: (peer, None if peer else "it is not here"))
    return CliRunner().invoke(main, [str(model), "--n-prompt", "4", "--n-gen", "2", "-r", "1", *args])


def test_both_with_the_same_threads(monkeypatch, model, used, tmp_path):
    """The most threads first, none beyond the cores; the file has speed-ups."""
    peer, path = Peer(), tmp_path / "speed.json"
    done = run(monkeypatch, model, peer, "--threads", "1,2,4,16", "--json", str(path))
    assert done.exit_code == 0 and "without llama.cpp" not in done.output
    assert list(dict.fromkeys(used)) == [4, 2, 1] and peer.threads == [("context", n, n) for n in (4, 2, 1)]
    rows = json.loads(path.read_text())
    assert [(row["test"], row["threads"]) for row in rows] == [(test, n) for test in ("pp4", "tg2") for n in (1, 2, 4)]
    assert all(row["pydsa t/s"] > 0 and row["llama.cpp t/s"] > 0 for row in rows) and rows[0]["pydsa speed-up"] == 1
    assert rows[1]["pydsa speed-up"] == rows[1]["pydsa t/s"] / rows[0]["pydsa t/s"]


def test_without_llama_cpp(monkeypatch, model, used):
    done = run(monkeypatch, model, None, "--threads", "2")
    assert done.exit_code == 0 and done.output.endswith("model.gguf; without llama.cpp: it is not here\n")
    assert "llama.cpp t/s" not in done.output and set(used) == {2}


def test_speed_ups_need_one_thread():
    rows = [{"test": "tg2", "threads": 4, "pydsa t/s": 12.0}, {"test": "pp4", "threads": 1, "pydsa t/s": 8.0},
            {"test": "pp4", "threads": 4, "pydsa t/s": 20.0}]
    assert [row["pydsa speed-up"] for row in with_speed_ups(rows)] == [1, 2.5, None]


@pytest.mark.parametrize("threads", ["0,2", "8"])
def test_threads_that_there_are_not(monkeypatch, model, used, threads):
    done = run(monkeypatch, model, None, "--threads", threads)
    assert done.exit_code == 2 and "--threads has no number from 1 to 4, the physical cores" in done.output
