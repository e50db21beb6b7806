"""Options of models in stages that are refused before Ray is started."""
import shutil
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import pydsa
from pydsa.cli import main
from pydsa.errors import PydsaError, StageError
from pydsa.stages import local_ray
from pydsa.stages.actors import read_bandwidth
from pydsa.stages.cluster import Cluster, _by_numbers


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Nothing is started."""
    def refuse(self, address=None):
        raise AssertionError("Ray is started")
    monkeypatch.setattr(Cluster, "__init__", refuse)


@pytest.mark.parametrize("options, said", [
    (dict(stages="auto"), "divides a model over the nodes of a cluster: give its address"),
    (dict(stages=0), "stages is '?0'?, expected 1 to"), (dict(stages="0-1,3-3"), "stages has 3.* after 0-1, expected"),
    (dict(stages=2, wire="f16"), "wire is 'f16', expected"), (dict(wire="bf16"), "wire is for a model in stages"),
    (dict(resume=True), "resume is for a model in stages"), (dict(stages=2, n_ubatch=-1), "n_ubatch is -1"),
    (dict(stages=900), "There are 900 stages, expected at most"),
    (dict(stages=2, threads=0), "threads is 0"), (dict(stages=2, resume="/proc/none"), "resume is '/proc/none', a folder that cannot")])
def test_what_means_nothing_is_refused(options, said):
    with pytest.raises(PydsaError, match=said):
        pydsa.load(pydsa.DEMO, **options)


def said_of(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    return result.output


def test_the_command_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert f"--resume is '{file}', which is a file" in said_of("run", "--stages", "2", "-p", "a", "--resume", str(file))
    assert "resume is for a model in stages" in said_of("run", "-p", "a", "--resume")
    assert "--ops times the ops of a step in this process" in said_of("bench", "--stages", "2", "--ops")
    assert "--record looks into the steps of this process" in said_of("run", "--stages", "2", "-p", "a", "--record", "a.npz")
    assert "--plot times the ops of a step in this process" in said_of("bench", "--ray", "auto", "--plot", str(tmp_path / "a.png"))


def test_nodes_are_in_the_order_of_their_numbers():
    names = ["fd00::9", "fd00::10", "10.0.0.2", "10.0.0.2:41000", "10.0.0.10", "10.0.1.1"]
    assert sorted(reversed(names), key=_by_numbers) == names


@pytest.mark.parametrize("n_threads", [1, 2])
def test_bandwidth_is_that_of_a_memory(n_threads):
    assert 1e8 < read_bandwidth(n_threads, 1 << 24) < 1e13


def test_without_ray_there_is_one_sentence(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StageError, match=r"^A model in stages needs Ray, which is not installed: pip install 'pydsa\[ray\]'\.$"):
        pydsa.load(pydsa.DEMO, stages=2)


@pytest.mark.parametrize("free, said", [((1, 1, 1 << 20), r"8 MiB in the folder for temporary files, .* and 1024 KiB are free"),
                                        (OSError(2, "gone"), r"no folder for Ray's temporary files \(gone\); name one in TMPDIR")])
def test_without_room_for_rays_files_there_is_one_sentence(free, said, monkeypatch):
    def disk_usage(path):
        if isinstance(free, OSError):
            raise free
        return type(shutil.disk_usage("/"))(*free)
    monkeypatch.undo()
    monkeypatch.setattr(local_ray, "shutil", SimpleNamespace(disk_usage=disk_usage))
    with pytest.raises(StageError, match=said):
        local_ray.make_folder()
