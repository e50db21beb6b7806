"""Files that lose pages while they are mapped: an error instead of SIGBUS, in what read them and only there."""
import gc
import os
import shutil

import numpy as np
import pytest
from serving import TINY, call, serving

import pydsa
from pydsa import LostFileError
from pydsa.backends.cpu import lost_pages
from pydsa.errors import GGUFError
from pydsa.gguf.file import open_gguf
from pydsa.machine import maps

pytestmark = pytest.mark.skipif(not lost_pages.CAN, reason="the system ends the process")
IDS = list(range(40, 60))


@pytest.fixture
def copy(small_model, tmp_path):
    """A model's file of its own."""
    return shutil.copy(small_model(**TINY), tmp_path / "model.gguf")


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2 // 4096 * 4096)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_file_that_is_cut_off(small_model, load, copy, device):
    model, other = pydsa.load(copy, device=device), load(small_model(**TINY))
    expected = other.logits(IDS)
    cut(copy)
    session = model.session()
    for _ in range(2):      # what is lost stays lost, also where the pages are zeros now
        with pytest.raises(LostFileError, match="model.gguf: a part of the file cannot be read any more"):
            session.prefill(IDS)
    assert session.n_past == 0 and np.array_equal(other.logits(IDS), expected)
    with pytest.raises(GGUFError, match="incomplete"):
        open_gguf(copy)


def test_a_server_says_that_its_file_is_lost(copy):
    with serving(pydsa.load(copy, threads=1)) as server:
        assert call(server, "GET", "/health")[0] == 200
        cut(copy)
        status, _, body = call(server, "POST", "/v1/completions", {"prompt": IDS})
        assert status == 500 and "cannot be read any more" in body["error"]["message"] and str(copy) not in body["error"]["message"]
        assert call(server, "GET", "/health")[0] == 500


def test_quantizing_a_file_that_is_cut_off(copy, tmp_path):
    def progress(done, total, name):
        if done:
            cut(copy)
    with pytest.raises(LostFileError):
        pydsa.quantize(copy, tmp_path / "out.gguf", "F16", progress=progress)
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_maps_are_forgotten_with_their_files(copy):
    def is_watched():
        return address in maps.TABLE[maps.ENTRIES::maps.WORDS]
    file = open_gguf(copy)
    address = next(iter(file.tensors.values())).data.base.ctypes.data
    assert is_watched() and not file.maps[0].lost
    del file
    gc.collect()
    assert not is_watched()
