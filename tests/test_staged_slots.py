"""A server whose model is in stages: slots that are saved, prefixes in memory and in files, and who may name what."""
import copy
import os
import time

import pytest
from serving import TINY, call, post, serving
from stage_processes import Launcher

import pydsa
from pydsa.stages.pipeline import Pipeline

OPTIONS = dict(device="reference", n_ctx=512, n_ubatch=64)
BODY = {"temperature": 0, "max_tokens": 8, "prompt": "Once upon a time there was a kettle " * 3}


@pytest.fixture(scope="module")
def whole(small_model):
    return pydsa.load(small_model(**TINY), **OPTIONS)


@pytest.fixture
def staged(small_model, whole):
    """The model in two stages."""
    launcher = Launcher(small_model(**TINY), [(0, 1), (1, 2)], **OPTIONS)
    model = copy.copy(whole)
    model.runner = Pipeline(launcher, launcher.setup)
    yield model
    model.runner.close()


def answer(server, **fields):
    """The text of an answer, and how many tokens of its prompt were cached."""
    status, reply = post(server, "/v1/completions", BODY | fields)
    assert status == 200, reply
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def expected(whole):
    return whole.complete(BODY["prompt"], 8, temperature=0).text


def test_slots_are_saved_by_the_stages(staged, whole, expected, tmp_path):
    with serving(staged, slot_folder=str(tmp_path), cache_bytes=0) as server:
        assert answer(server, id_slot=0) == (expected, 0)
        status, saved = post(server, "/slots/0?action=save", {"filename": "talk"})
        assert status == 200 and len(os.listdir(tmp_path)) == 3
        assert saved["n_written"] == sum(path.stat().st_size for path in tmp_path.iterdir())
        for slot in (0, 1):
            call(server, "POST", f"/slots/{slot}?action=erase")
            status, restored = post(server, f"/slots/{slot}?action=restore", {"filename": "talk"})
            assert status == 200 and (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
            text, n_cached = answer(server, id_slot=slot)
            assert text == expected and n_cached > 20
    with serving(whole, slot_folder=str(tmp_path), cache_bytes=0) as server:        # a server of one process has the same slots
        assert post(server, "/slots/1?action=restore", {"filename": "talk"})[1] == restored | {"id_slot": 1}
        assert answer(server, id_slot=1) == (expected, n_cached)


def test_errors_of_stages_do_not_tell_where_files_lie(staged, tmp_path):
    with serving(staged, slot_folder=str(tmp_path)) as server:
        answer(server, id_slot=0)
        post(server, "/slots/0?action=save", {"filename": "talk"})
        for path in tmp_path.glob("talk.layers-1-*"):
            path.write_bytes(b"pydsa")
        status, error = post(server, "/slots/0?action=restore", {"filename": "talk"})
        assert status == 400 and "talk.layers-1-1." in error["error"]["message"] and str(tmp_path) not in error["error"]["message"]


@pytest.mark.parametrize("name", ["talk.layers-0-1.0123456789abcdef", "talk.part"])
@pytest.mark.parametrize("action", ["save", "restore"])
def test_parts_of_others_cannot_be_named(whole, tmp_path, name, action):
    with serving(whole, slot_folder=str(tmp_path)) as server:
        status, error = post(server, f"/slots/0?action={action}", {"filename": name})
        assert status == 400 and "the form of a stage's part" in error["error"]["message"]


@pytest.mark.parametrize("cache_bytes", [1 << 30, 40_000])
def test_prefixes_come_from_memory_and_from_files(staged, expected, tmp_path, cache_bytes):
    """With 40,000 bytes what another conversation displaces lies in files."""
    with serving(staged, slot_folder=str(tmp_path), cache_bytes=cache_bytes, n_parallel=1) as server:
        assert answer(server) == (expected, 0)
        answer(server, prompt="Quite another conversation, as long as the first one or longer, which takes its slot. " * 2)
        end = time.monotonic() + 10     # files are written when the answer has been told
        while cache_bytes < 1 << 20 and not any(name.endswith(".rows") for name in os.listdir(tmp_path)):
            assert time.monotonic() < end
            time.sleep(0.01)
        text, n_cached = answer(server)
        assert text == expected and n_cached > 20


def test_a_stage_that_fails_is_a_fault_of_the_server(staged):
    with serving(staged, cache_bytes=0) as server:
        answer(server)
        staged.runner.launcher.kill(1)
        for status, body in (post(server, "/v1/completions", BODY), call(server, "GET", "/health")[::2]):
            assert status == 500 and "A part of the model has failed" in str(body) and "server_error" in str(body)
