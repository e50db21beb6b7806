"""pydsa info --stages: bytes on nodes and on the wire, the speed that they allow, and what is refused."""
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner

from pydsa import DEMO, PydsaError
from pydsa.cli import main
from pydsa.options import bytes_per_second
from pydsa.sampling import Picked
from pydsa.setup import Setup
from pydsa.stages.division import Layers, Node
from pydsa.stages.forecast import Link, Times, Wire, chunks, forecast, in_turn, in_words, one_stream, prompt_seconds, wire_of
from pydsa.stages.wire import Part, Result, Step, encode

LINK = Link(1e9, 100e-6)


@pytest.fixture(scope="module")
def setup():
    return Setup(DEMO, n_ubatch=512)


def test_one_conversation_waits_for_all_stages_in_turn():
    wire = Wire(1000)       # bytes of a row
    assert one_stream([0.01], LINK, wire) == 0.01       # one process: there is no wire
    assert (wire.step(1), wire.step(1, first=True), wire.result()) == (1072, 72, 60)
    assert one_stream([0.01, 0.02, 0.03], LINK, wire) == pytest.approx(0.06 + 3 * 100e-6 + 3 * 1072 / 1e9)


def test_many_steps_are_bound_by_the_slowest_stage_or_the_wire_or_their_number():
    wire, fast = Wire(28672), [1e-6, 1e-6]
    assert in_turn([0.01, 0.03], LINK, wire, 3) == 0.03
    assert in_turn([0.01], LINK, wire, 1) == 0.01
    way = 2e-6 + 2 * 100e-6 + 2 * wire.step(1) / 1e9
    assert in_turn(fast, LINK, wire, 3) == pytest.approx(way / 3)
    slow = Link(1e6, 0.0)
    assert in_turn(fast, slow, wire, 300) == pytest.approx(wire.step(1) / 1e6)


def test_bytes_are_those_of_the_wire():
    """Frames as they are sent, behind their length in eight bytes."""
    def sent(frame, wire="f32"):
        return 8 + sum(len(memoryview(part).cast("B")) for part in encode(frame, wire) if len(part))
    parts, ids = [Part(1, 50, 3), Part(2, 0, 4)], np.arange(7, dtype=np.int32)
    step = Step(1, 2, "sparse", parts, [5, 6], ids, np.ones((7, 32), np.float32))
    assert (sent(step), sent(step, "bf16")) == (Wire(128).step(7, 2, 2), Wire(64).step(7, 2, 2))
    assert sent(step._replace(rows=None)) == Wire(128).step(7, 2, 2, first=True)
    assert sent(Result(1, 2, False, [Picked(1, 2.0, 3.0)] * 5, np.zeros((0, 300), np.float32))) == Wire(128).result(5)


def test_chunks_of_a_prompt_follow_each_other():
    steps, free = chunks(4 * 512), Link(math.inf, 0.0)
    assert chunks(1200, 100) == [(512, 100), (512, 612), (176, 1124)]
    assert prompt_seconds(lambda n, n_past: [1.0, 1.0], free, Wire(8), steps, 3) == 5       # four, and one while the last goes through
    assert prompt_seconds(lambda n, n_past: [1.0, 1.0], free, Wire(8), steps, 1) == 8       # each waits for the one before
    assert prompt_seconds(lambda n, n_past: [2.0], LINK, Wire(8), steps, 1) == 8
    late = prompt_seconds(lambda n, n_past: [1.0, 1.0], Link(math.inf, 0.25), Wire(8), steps, 3)
    assert late == 6        # to the first stage, to the second, to the first with the head, and to the driver


def test_times_are_bytes_or_products(setup):
    ranges, n = (Layers(0, 2), Layers(2, 4)), 8191
    slow = [Node("a", 1e9, rate=1e6), Node("b", 2e9, rate=1e30)]
    times, whole = Times(setup, ranges, slow), Times(setup, (Layers(0, 4),), [Node("", 1e9, rate=1e30)])
    a, b = times.generation(n)
    assert a + 2 * b == pytest.approx(whole.generation(n)[0])       # one token: reads alone
    assert whole.generation(n, 4)[0] < 4 * whole.generation(n)[0]       # what is no expert is read once
    assert times.prompt(512, 0)[0] > 512 * 2 * 1e6 / 1e6 > 1e3 * times.prompt(512, 0)[1]       # more than 10^6 weights, at 10^6 products
    assert times.prompt(512, 4096)[1] > times.prompt(512, 0)[1]


def test_forecast(setup):
    nodes = [Node("a", 100e9, 40 << 20), Node("b", 50e9)]
    found = forecast(setup, (Layers(0, 2), Layers(2, 4)), nodes, LINK, "bf16")
    first, second = found["stages"]
    assert first["free"] == (40 << 20) - first["weights"] - first["caches"] - first["scratch"] and second["free"] is None
    assert (first["layers"], second["layers"], found["options"]) == ("0-1", "2-3", "--stages 0-1,2-3")
    seconds = [first["token_bytes"] / 100e9, second["token_bytes"] / 50e9]
    assert [first["token_seconds"], second["token_seconds"]] == seconds and first["caches"] + second["caches"] == 2 * setup.cache_bytes
    wire = wire_of(setup, "bf16")
    assert wire.row == 512 and wire_of(setup).row == 1024 and wire_of(Setup(DEMO, device="reference")).row == 2048
    assert found["wire"]["token_bytes"] == 584 and found["wire"]["logits_bytes"] == 4 * 3072
    assert 1 / found["one"]["ts"] == found["one"]["seconds"] == one_stream(seconds, LINK, wire)
    assert found["many"] == {"streams": 2, "steps": 2, "ts": pytest.approx(1 / in_turn(seconds, LINK, wire, 2)),
                             "step_seconds": in_turn(seconds, LINK, wire, 2)}
    many = forecast(setup, (Layers(0, 2), Layers(2, 4)), nodes, LINK, n_streams=7)["many"]
    assert (many["steps"], many["ts"]) == (2, pytest.approx(7 / 2 / many["step_seconds"]))       # 4 and 3 conversations
    alone = forecast(setup, (Layers(0, 2), Layers(2, 4)), nodes, LINK, n_streams=1)
    assert alone["many"]["ts"] == pytest.approx(alone["one"]["ts"]) and not any("conversations" in line for line in in_words(alone))
    short = forecast(setup, (Layers(0, 2), Layers(2, 4)), [nodes[0]._replace(memory=(40 << 20) - first["free"] - 1024)] * 2, LINK, "bf16")
    assert short["stages"][0]["free"] == -1024 and "lacks 1.0 KiB" in "".join(in_words(short))      # of layers that were asked for
    whole = forecast(setup, (Layers(0, 4),), nodes[:1], LINK)
    assert whole["wire"]["token_bytes"] == whole["one"]["wire_seconds"] == 0
    assert not any("wire" in line or "under way" in line for line in in_words(whole))
    with pytest.raises(PydsaError, match="wire is 'f16', expected one of f32, bf16"):
        wire_of(setup, "f16")


@pytest.mark.parametrize("text, expected", [("10Gbit/s", 1.25e9), ("1.25 GB/s", 1.25e9), ("100Mbit/s", 12.5e6), ("2kB/s", 2e3)])
def test_rates(text, expected):
    assert bytes_per_second("link", text) == expected


@pytest.mark.parametrize("text", ["10", "10Gb/s", "0Gbit/s", "fast", "-1GB/s", "1e9B/s", 5, "9" * 30 + "GB/s"])
def test_rates_that_are_none(text):
    with pytest.raises(PydsaError, match="expected bits or bytes a second such as 10Gbit/s or 1.25GB/s"):
        bytes_per_second("link", text)


def info(*args):
    return CliRunner().invoke(main, ["info", str(DEMO), *args])


def test_info():
    assert "products at 1000 to 4000 GOP/s a node" in info("--stages", "2", "--gops", "4000,1000").output
    text = info("--stages", "2", "--bandwidth", "50,200").output
    lines = text[text.index("\nstages\n"):].split("\n\n")[0].splitlines()[2:]
    assert [line.split()[:5] for line in lines[1:3]] == [["node", "1", "50", "GB/s", "0"], ["node", "2", "200", "GB/s", "1-3"]]
    assert lines[3] == "  as --stages 0,1-3"
    assert "1.1 KiB a token from stage to stage and back to the first (f32 rows), 60 B to the driver" in lines[4]
    assert lines[5].endswith("1.25 GB/s and 100 us (assumed: --link and --latency give others)")
    assert "one conversation: at most" in lines[6] and "assumed" not in lines[6] and lines[7].startswith("  2 conversations, 2 steps")
    assert "a prompt of 4096 tokens in chunks of 128: at most " in info("--stages", "2", "-ub", "128").output
    assert "a prompt of 4096 tokens in chunks of 512" in lines[8] and lines[8].endswith("(assumed: --gops gives others)")
    options = "--link", "1Gbit/s", "--latency", "5", "--streams", "1"
    report = json.loads(info("--stages", "0-1,2-3", "-o", "json", "-c", "0", *options).output)
    assert report["stages"]["wire"]["bandwidth"] == 125e6 and report["stages"]["assumed"] == ["bandwidth", "gops"]
    assert report["n_ubatch"] == 512 and sum(stage["caches"] for stage in report["stages"]["stages"]) == report["memory"]["caches"]
    assert json.loads(info("-o", "json").output)["stages"] is None


@pytest.mark.parametrize("option, values, layers", [("--node-memory", "1GiB", ["0-3"]), ("--node-memory", "45MiB", ["0-1", "2-3"]),
                                                    ("--node-memory", "26MiB,1GiB", ["0", "1-3"]), ("--bandwidth", "300,1", ["0-2", "3"])])
def test_auto(option, values, layers):
    """As many nodes of one size as are needed, or those that are given."""
    report = json.loads(info("--stages", "auto", option, values, "--streams", "2", "-o", "json").output)["stages"]
    assert [stage["layers"] for stage in report["stages"]] == layers
    assert all(stage["memory"] is None or stage["free"] >= 0 for stage in report["stages"])


@pytest.mark.parametrize("args, error", [
    (["--stages", "auto"], "--stages auto needs nodes: give --node-memory"), (["--link", "1Gbit/s"], "--link is for --stages"),
    (["--streams", "2"], "--streams is for --stages"), (["--stages", "2", "-ngl", "1"], "leave out --gpu-layers"),
    (["--stages", "2", "--gpu-memory", "24GiB"], "leave out --gpu-memory"), (["--stages", "2", "--no-mmap"], "leave out --no-mmap"),
    (["--stages", "2", "--check"], "leave out --check"), (["--stages", "x"], "stages is 'x', expected a number of stages such as 2"),
    (["--stages", "0-1,3"], "begins with layer 2"), (["--stages", "9"], "There are 9 stages, expected at most 4"),
    (["--stages", "2", "--node-memory", "1GiB,1GiB,1GiB"], "--node-memory has 3 values for 2 nodes"),
    (["--stages", "3", "--bandwidth", "1,2"], "--bandwidth has 2 values for 3 nodes"),
    (["--stages", "2", "--bandwidth", "0"], "--bandwidth is '0'"),
    (["--stages", "2", "--gops", "nan"], "--gops is 'nan'"), (["--stages", "2", "--latency", "nan"], "--latency is nan"),
    (["--stages", "2", "--link", "10Gb/s"], "link is '10Gb/s'"), (["--stages", "2", "--node-memory", "24"], "give a unit"),
    (["--stages", "2", "--device", "cpu,cuda"], "expected one in --device, not cpu,cuda"),
    (["--stages", "auto", "--node-memory", "20MiB"], "takes .* in 4 stages, and the nodes have 80.0 MiB: at best layer")])
def test_what_is_refused(args, error):
    result = info(*args)
    said = result.stderr if isinstance(result.exception, SystemExit) else str(result.exception)
    assert isinstance(result.exception, (SystemExit, PydsaError)) and result.exit_code
    assert re.search(error, " ".join(said.split()))
