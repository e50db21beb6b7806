"""The command line: stdout, stderr, exit codes, chat on a terminal."""
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from pydsa import DEMO
from pydsa.cli import main


def pydsa(*args, input=None):
    return CliRunner().invoke(main, [str(a) for a in args], input=input)


def run(model, *args, **kwargs):
    return pydsa("run", model, "-t", 1, "-c", 200, *args, **kwargs)


@pytest.fixture(scope="module")
def model(golden):
    return golden("ds32-q8_0")[0]


def test_run_writes_only_the_text_to_stdout(model, load):
    result = run(model, "-p", "Hello", "-n", 12, "--temp", 0)
    engine = load(model)
    expected = "".join(engine.chat([{"role": "user", "content": "Hello"}], max_tokens=12, temperature=0.0))
    assert (result.exit_code, result.stdout) == (0, expected)
    summary = r"prompt \d+ tokens, [\d.]+ t/s; generation 12 tokens, [\d.]+ t/s; first token after [\d.]+ s; attention dense up to 64"
    assert re.search(summary, result.stderr)


def test_raw_prompts(model, load, tmp_path):
    expected = "".join(load(model).generate("Once upon", max_tokens=9, temperature=0.0))
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon", encoding="utf-8")
    marked = tmp_path / "windows.txt"
    marked.write_text("Once upon\n", encoding="utf-8-sig")
    common = ("--raw", "-n", 9, "--temp", 0)
    inputs = [("-p", "Once upon"), ("-f", file), ("-f", marked), ("-f", "-"), ()]
    for result in (run(model, *args, *common, input="Once upon") for args in inputs):
        assert (result.exit_code, result.stdout) == (0, expected)


def test_a_seed_repeats(model):
    texts = [run(model, "-p", "Hello", "-n", 20, "--temp", 1.5, "-s", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_system_message_changes_the_prompt(model):
    results = [run(model, "-p", "Hi", "-n", 1, *more) for more in ((), ("--system", "Be brief."))]
    without, with_system = (int(re.search(r"prompt (\d+) tokens", result.stderr)[1]) for result in results)
    assert with_system > without


@pytest.mark.parametrize("args, message", [
    (["run", "no-such.gguf", "-p", "x"], "no such file"),
    (["run", "MODEL", "-p", "x", "-f", "-"], "not both"),
    (["run", "MODEL", "-p", "x", "--temp", "-1"], "Error: temperature is -1.0, expected a number from 0.\n"),
    (["run", "MODEL", "-p", "x", "--raw", "--think"], "--raw leaves out"),
    (["run", "MODEL", "-p", "x", "-c", "-1"], "n_ctx is -1"),
    (["run", "MODEL", "-p", "x", "-c", "1000000000"], "GiB"),
    (["run", "MODEL", "-p", "x", "-t", "100000"], "threads is 100000"),
    (["run", "MODEL", "-p", "x" * 5000, "-c", "64"], "The context holds 64 tokens"),
    (["run", "MODEL", "-p", ""], "The prompt is empty"),
    (["run", "DENSE", "-p", "x", "--attention", "sparse"], "has no indexer"),
    (["run", "DENSE", "-p", "x", "--dsa-top-k", "5"], "has no indexer"),
    (["bench", "MODEL", "-p", "many"], "expected integers"),
    (["bench", "MODEL", "-p", "0", "-n", "0"], "nothing to time"),
    (["bench", "MODEL", "--attention", "some"], "attention is 'some'"),
    (["info", __file__], "not a GGUF file"),
])
def test_mistakes_end_with_a_sentence_and_exit_code_2(args, message, golden):
    paths = {"MODEL": golden("ds32-q8_0")[0], "DENSE": golden("ds2-q4_0")[0]}
    result = pydsa(*(paths.get(a, a) for a in args))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name, value", [("NUMBA_DISABLE_JIT", "1"), ("NUMBA_NUM_THREADS", "0")])
def test_settings_of_numba_with_which_nothing_is_compiled(name, value, model, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    for args in ["run", model, "-p", "x"], ["quantize", DEMO, tmp_path / "out.gguf", "Q4_0"]:
        result = pydsa(*args)
        assert result.exit_code == 2 and name in result.stderr and "Traceback" not in result.stderr
    assert pydsa("run", model, "-p", "x", "-n", 1, "--device", "reference").exit_code == 0


def test_a_full_context_keeps_the_text_and_ends_with_a_sentence(model):
    result = run(model, "-p", "Hello", "--temp", 0, "-c", 40)
    assert result.exit_code == 2 and result.stdout
    assert "The context holds 40 tokens" in result.stderr and "generation" in result.stderr


def test_bench_rows(model):
    result = pydsa("bench", model, "-t", 1, "-p", "16,8", "-n", 4, "-d", "0,70", "-r", 2, "--attention", "sparse,masked", "-o", "json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows if r["attention"] == "sparse"] == [
        (16, 0, 0), (8, 0, 0), (0, 4, 0), (16, 0, 70), (8, 0, 70), (0, 4, 70)]
    assert {r["attention"] for r in rows} == {"sparse", "masked"}
    for row in rows:
        assert row["avg_ts"] > 0 and row["stddev_ts"] >= 0 and len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        limits = [row[key] for key in ("bytes_per_token", "bandwidth_gbs", "limit_ts", "share_of_limit")]
        if row["n_prompt"]:
            assert limits == [None] * 4
        else:
            n_bytes, bandwidth, limit, share = limits
            assert limit == pytest.approx(bandwidth * 1e9 / n_bytes) and share == pytest.approx(row["avg_ts"] / limit)
    shallow, deep = ([r["bytes_per_token"] for r in rows if r["n_gen"] and r["n_depth"] == depth] for depth in (0, 70))
    assert 1e6 < max(shallow) < min(deep) and deep[0] < deep[1]     # sparse attention reads less of the cache than masked does


def test_bench_forms(model):
    args = ("bench", model, "-t", 1, "-p", 8, "-n", 0, "-r", 1, "-o")
    table = pydsa(*args, "md").stdout.splitlines()
    assert len(table) == 3 and table[0].startswith("| model") and "pp8" in table[2] and "±" in table[2]
    assert pydsa(*args, "csv").stdout.splitlines()[0].startswith("model_filename,")
    assert json.loads(pydsa(*args, "jsonl").stdout)["n_prompt"] == 8
    head, _, prompt, generation = ([cell.strip() for cell in line.split("|")[1:-1]] for line in
                                   pydsa("bench", model, "-t", 1, "-p", 8, "-n", 2, "-r", 1).stdout.splitlines())
    assert head[-3:] == ["MB/token", "limit t/s", "share"] and prompt[-3:] == ["-"] * 3
    assert [bool(re.fullmatch(r"[\d.]+%?", cell)) for cell in generation[-3:]] == [True] * 3


def test_bench_ops(model):
    rows = json.loads(pydsa("bench", model, "-t", 1, "-p", 8, "-n", 1, "-d", 70, "-r", 1, "--ops", "-o", "json").stdout)
    assert {"linear", "indexer_select", "sparse_attention", "moe_down"} <= {row["op"] for row in rows}
    for n_tokens in (1, 8):
        assert sum(row["share"] for row in rows if row["n_tokens"] == n_tokens) == pytest.approx(1)
    for row in rows:
        seconds = row["us"] / 1e6
        assert row["bytes"] > 0 and row["gbs"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["gops"] == pytest.approx(row["operations"] / seconds / 1e9)
        assert row["share_of_ceiling"] == pytest.approx(max(row["gbs"] / row["bandwidth_gbs"], row["gops"] / row["peak_gops"]))
    table = pydsa("bench", model, "-t", 1, "-p", 0, "-n", 1, "-r", 1, "--ops").stdout
    assert re.match(r"\| test +\| tokens \| .* us \| +share \| +GB/s \| GOP/s \| of ceiling \|\n", table)


def test_the_reference_has_no_limits(model):
    args = ("bench", model, "-p", 2, "-n", 1, "-r", 1, "--device", "reference")
    for row in json.loads(pydsa(*args, "-o", "json").stdout):
        assert {row[key] for key in ("bytes_per_token", "bandwidth_gbs", "limit_ts", "share_of_limit")} == {None}
    for row in json.loads(pydsa(*args, "--ops", "-o", "json").stdout):
        assert row["us"] > 0 and {row[key] for key in ("bytes", "gbs", "gops", "peak_gops", "share_of_ceiling")} == {None}
    assert pydsa(*args).stdout.splitlines()[3].replace(" ", "").endswith("|-|-|-|")


def test_info(golden):
    path, _ = golden("glm-q8_0")
    text = pydsa("info", path).stdout
    assert "Q8_0" in text and "layers 1: dense, then sparse attention, the choice of the last layer with an indexer" in text
    report = json.loads(pydsa("info", path, "-o", "json", "-c", 1000, "--attention", "masked").stdout)
    assert report["memory"]["caches"] == 1000 * (3 * (2 * 288 + 8) + 2 * (64 + 4))
    assert report["memory"]["scratch"] > 512 * 1000 * 4
    assert report["layers"] == {"masked attention, own indexer, dense ffn": "0", "masked attention, own indexer, 2 of 4 experts": "2",
                                "masked attention, the choice of the last layer with an indexer, 2 of 4 experts": "1"}


def test_trace_names_every_node(model, load):
    rows = json.loads(pydsa("trace", model, "-p", "Hello there", "--kv-type", "f32", "-o", "json", "-t", 1).stdout)
    assert [rows[0]["node"], rows[-1]["node"]] == ["inp_embd", "result_output"]
    assert max(row["error"] for row in rows) < 1e-5     # activations are rounded to 15 bits
    assert {"attn_norm-0", "kv_cmpr_pe-1", "indexer_k-2", "ffn_moe_weights-1", "l_out-2"} <= {row["node"] for row in rows}


def test_help_needs_no_numba():
    program = "import sys; from pydsa.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'numba' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_output_into_a_closed_pipe_is_no_traceback(model):
    process = subprocess.Popen([sys.executable, "-m", "pydsa", "run", str(model), "-p", "Hello", "-t", "1", "-c", "300"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *args):
        import pty
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)    # background jobs of a shell ignore it
            os.execvp(args[0], args)
        self.text = ""

    def send(self, text):
        os.write(self.fd, text.encode())

    def expect(self, pattern, seconds=120):
        """Read until the pattern matches, and return the text up to there.

        Matching starts after the previous match.
        """
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.text)) is None:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], f"{pattern!r} did not come: {self.text!r}"
            try:
                self.text += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:     # the program has ended
                assert re.search(pattern, self.text), f"{pattern!r} did not come: {self.text!r}"
        seen, self.text = self.text[:match.end()], self.text[match.end():]
        return seen


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal(model):
    terminal = Terminal(sys.executable, "-m", "pydsa", "run", str(model), "-t", "1", "-c", "3000", "--temp", "0")
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.send("/help\n")
    terminal.expect("/clear  forget")
    terminal.expect("> ")
    terminal.send("Hello\n")
    terminal.expect(r"(?s)Hello\r\n.*.{400}")        # well into the reply
    os.kill(terminal.pid, signal.SIGINT)
    terminal.expect(r"\[stopped\]")
    first = terminal.expect(r"generation \d+ tokens")
    assert int(re.search(r"prompt (\d+) tokens", first)[1]) > 1
    terminal.expect("> ")
    terminal.send("/nonsense\n")
    terminal.expect("there is no command /nonsense")
    terminal.expect("> ")
    terminal.send("/exit\n")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_llama_cpp_s_name_of_a_cache_type(golden):
    """q8_0 stands for i8, in the options and in saved sessions."""
    args = ["info", str(golden("ds32-q8_0")[0]), "-o", "json", "--kv-type", "q8_0", "--index-type", "q8_0"]
    report = json.loads(CliRunner().invoke(main, args).stdout)
    assert report["kv_type"] == report["index_type"] == "i8"


def test_a_session_saved_with_the_old_name_of_a_cache_type(small_model, load, tmp_path):
    model, path = load(small_model(), kv_type="q8_0"), tmp_path / "session"
    session, other = model.session(), model.session()
    session.prefill([1, 2, 3])
    session.save(path)
    data = path.read_bytes()
    start = data.index(b"{")
    header = data[start:data.index(b"}", data.rindex(b"tokens")) + 1]
    old = header.replace(b'"kv_type": "i8"', b'"kv_type": "q8_0"').replace(b'"index_type": "i8"', b'"index_type": "q8_0"')
    assert old != header
    rows = data[start + len(header):-32]
    path.write_bytes(data[:start - 8] + len(old).to_bytes(8, "little") + old + rows + hashlib.sha256(old + rows).digest())
    other.load(path)
    assert other.tokens == [1, 2, 3]
