"""tools/serve_load.py: what is timed and counted, servers that come and go, those that fail."""
import json
import os
import stat
import sys

import pytest
from click.testing import CliRunner
from serving import TINY, serving

from tools.make_model import ModelSpec, make_model
from tools.serve_load import Prompts, best, figures, main, ratios, the_servers
from tools.servers import Client, Load, Stream, body_parts, llama_cpp_python_command, llama_server_command, pydsa_command, read_stream

# A program that stands for llama-server: it notes how it was started and what it was asked, and is ready at the second try.
STANDING = '''#!{python}
import http.server, json, socket, sys
socket.getfqdn = str        # no name server shall be asked
notes, n_asked = open({notes!r}, "a"), 0
print(json.dumps(sys.argv[1:]), file=notes, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args):
        pass
    def do_GET(self):
        global n_asked
        n_asked += 1
        self.send_response(200 if n_asked > 1 else 503)
        self.send_header("content-length", "0")
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        print(json.dumps(body), file=notes, flush=True)
        events = [{{"choices": [{{"text": "x", "finish_reason": None}}]}}] * body["max_tokens"]
        events.append({{"choices": [], "usage": {{"completion_tokens": body["max_tokens"], "prompt_tokens": 5}}}})
        self.send_response(200)
        self.end_headers()
        for event in [*map(json.dumps, events), "[DONE]"]:
            self.wfile.write(f"data: {{event}}\\r\\n\\r\\n".encode())
        self.close_connection = True

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("load") / "model.gguf", ModelSpec(n_layer=2, n_layer_dense=1))


def program(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(model_path, *args):
    return CliRunner().invoke(main, [str(model_path), "--n-prompt", "8", "--n-gen", "4", "--rounds", "2", "-t", "1", *map(str, args)])


def test_the_engine_beside_a_peer(model_path, tmp_path):
    """Both get the same load, of prompts that differ; no server is left."""
    peer = program(tmp_path / "llama-server", STANDING.format(python=sys.executable, notes=str(tmp_path / "notes")))
    done = run(model_path, "--engine", "--streams", "1,2", "--peer", "llama-server", peer, "-o", "json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    rows = result["rounds"]
    assert [(row["round"], row["server"], row["streams"]) for row in rows] == [(i, name, n) for i in (0, 1) for name in
                                                                               ("engine", "llama-server") for n in (1, 2)]
    assert all(row["tokens"] == 4 * row["streams"] and row["t/s"] > 0 and len(row["prompts"]) == row["streams"] for row in rows)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    commands, asked = [note for note in notes if isinstance(note, list)], [note for note in notes if isinstance(note, dict)]
    assert len(commands) == 2 and all("--no-repack" in command and command[command.index("-np") + 1] == "2" for command in commands)
    prompts = [note["prompt"] for note in asked]
    assert len(set(prompts)) == len(prompts) == 2 * 2 * (1 + 2) and all(note["temperature"] == 0 and note["logit_bias"] for note in asked)
    port = int(commands[-1][-1])
    assert Client(port, None).get("/health") == 0


def test_the_table(model_path):
    done = run(model_path, "--engine", "--streams", "2,1", "--rounds", "1")
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.stdout.splitlines()[2:4]]
    assert done.exit_code == 0 and cells == [["engine", "1"], ["engine", "2"]]
    assert "engine: 2 streams together get " in done.stdout and "model.gguf; prompts of 8 tokens, answers of 4, greedy" in done.stdout


def test_a_client_of_pydsa(small_model, load):
    model = load(small_model(**TINY), n_ctx=1024, device="reference", threads=None)
    with serving(model) as server:
        stream = Client(server.sockets[0].getsockname()[1], Load("", 1, 1, 1024, (2,))).ask("Once upon", 6)
        assert (stream.n_prompt, stream.n_tokens) == (len(model.tokenize("Once upon", parse_special=True)), 6)
        assert stream.start < stream.times[0] <= stream.times[-1] <= stream.end
        with pytest.raises(RuntimeError, match="the server answered 400: .*context"):
            Client(server.sockets[0].getsockname()[1], Load("", 1, 1, 1024)).ask("word " * 1024, 6)


@pytest.mark.parametrize("text, words", [("sys.exit('there is no such model')", "ended with 1; it wrote: there is no such model"),
                                         ("sys.exit(3)", "ended with 3; it wrote nothing")])
def test_a_server_that_does_not_start(model_path, tmp_path, text, words):
    peer = program(tmp_path / "broken", f"#!{sys.executable}\nimport sys\n{text}\n")
    done = run(model_path, "--engine", "--streams", "1", "--peer", "llama-server", peer)
    assert done.exit_code == 2 and done.stderr.splitlines()[-1] == f"llama-server: broken {words}"


def test_streams_that_are_none(model_path):
    done = run(model_path, "--engine", "--streams", "0,2")
    assert done.exit_code == 2 and "expected numbers from 1 on" in done.output


def test_what_is_read_of_a_stream():
    """Events may be cut anywhere; a text counts when its last byte has come."""
    parts = [(1.0, b': waits\n\ndata: {"choices": [{"te'), (2.0, b'xt": "a"}]}\r\n\r\ndata: {"choices": [{"text": ""}]}\n\n'),
             (3.0, b'data: {"choices": [{"text": "b", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n')]
    assert read_stream(0.5, parts, 7) == Stream(0.5, [2.0, 3.0], 3.0, None, 7)
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 9}}\n\n'
    assert read_stream(0.5, [*parts, (4.0, usage)], 7)[2:] == (4.0, 9, 5)
    with pytest.raises(RuntimeError, match="before it had 7 tokens, and the server does not tell"):
        read_stream(0.5, parts[:2], 7)
    with pytest.raises(RuntimeError, match="ended the answer: .*too hot"):
        read_stream(0.5, [*parts, (4.0, b'data: {"error": {"message": "too hot"}}\n')], 7)


def test_what_is_read_of_a_response():
    """A head and chunks may be cut anywhere."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [(1.0, head[:20]), (2.0, head[20:] + b"3\r\nab"), (3.0, b"c\r"), (4.0, b"\n2\r\nde\r\n0\r\n\r\n")]
    assert body_parts(parts) == [(4.0, b"abc"), (4.0, b"de")]
    assert body_parts([(1.0, b"HTTP/1.0 200 OK\r\n\r\n"), (2.0, b"abc")]) == [(2.0, b"abc")]
    with pytest.raises(RuntimeError, match="broke off .*the last chunk is missing"):
        body_parts(parts[:3])
    with pytest.raises(RuntimeError, match="broke off .*no response"):
        body_parts([])
    with pytest.raises(RuntimeError, match="the server answered 429: full"):
        body_parts([(1.0, b"HTTP/1.1 429 Too Many Requests\r\n\r\nfull")])


def test_figures_by_hand():
    streams = [Stream(10.0, [10.5, 11.0, 11.25], 12.0, 3, 4), Stream(10.0, [11.5, 12.5], 14.0, 4, 8)]
    row = figures(streams)
    assert (row["tokens"], row["seconds"], row["t/s"]) == (12, 4.0, 3.0)
    assert (row["first token"], row["last first token"], row["longest gap"]) == (1.0, 1.5, 1.0)
    assert row["t/s of a stream"] == (3 / 0.75 + 7 / 1.0) / 2


def test_the_fastest_round_counts():
    rows = [{"server": name, "streams": n, "t/s": speed} for name, n, speed in
            (("pydsa", 1, 10.0), ("pydsa", 8, 30.0), ("peer", 1, 5.0), ("peer", 8, 12.0), ("pydsa", 8, 20.0), ("peer", 1, 8.0))]
    assert [row["t/s"] for row in best(rows)] == [10, 30, 8, 12]
    assert list(ratios(best(rows))) == ["pydsa: 8 streams together get 3.00 times the t/s of 1.",
                                        "peer: 8 streams together get 1.50 times the t/s of 1.",
                                        "pydsa has 1.25 times the t/s of peer at 1 at once.",
                                        "pydsa has 2.50 times the t/s of peer at 8 at once."]


def test_the_servers_that_are_measured(monkeypatch):
    """pydsa first; the reproducible one and the peers run in the same rounds."""
    monkeypatch.setattr("tools.serve_load.started", lambda command, load: command)
    monkeypatch.setattr("tools.serve_load.in_process", lambda load, reproducible=False: reproducible)
    load, peers = Load("m.gguf", 2, 8, 256), [("llama-server", "a/llama-server"), ("llama-cpp-python", "b/python")]
    servers = {name: start() for name, start in the_servers(load, peers, False, True).items()}
    assert list(servers) == ["pydsa", "pydsa, reproducible", "llama-server", "llama-cpp-python"]
    assert servers["pydsa, reproducible"] == [*servers["pydsa"], "--reproducible"]
    assert servers["llama-server"][0] == "a/llama-server" and servers["llama-cpp-python"][0] == "b/python"
    assert {name: start() for name, start in the_servers(load, [], True, True).items()} == {"engine": False, "engine, reproducible": True}


def test_commands():
    """The same threads and contexts; repacking is off unless it is asked for."""
    load = Load("m.gguf", 3, 4, 512)
    assert pydsa_command(load, "--reproducible")[1:] == ["-m", "pydsa", "serve", "m.gguf", "--device", "cpu", "-t", "3", "-tb", "3",
                                                         "-np", "4", "-c", "512", "--reproducible"]
    assert "-c 2048" in " ".join(llama_server_command(load, "x")) and "--no-repack" in llama_server_command(load, "x")
    assert "--no-repack" not in llama_server_command(load._replace(repack=True), "x")
    assert llama_cpp_python_command(load, "py")[:5] == ["py", "-m", "llama_cpp.server", "--model", "m.gguf"]


def test_prompts_have_a_length(load, small_model):
    tokenizer = load(small_model(**TINY), n_ctx=1024, device="reference", threads=None).tokenizer
    prompts = Prompts(tokenizer, 40)
    assert prompts(1, 2) == prompts(1, 2) != prompts(1, 3)
    assert all(40 <= len(tokenizer.encode(prompts(i), add_bos=True)) < 80 for i in range(5))
    assert os.path.commonprefix([prompts(i) for i in range(20)]) == ""
