import json
import os
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU alone repeats bit by bit
if "PYTEST_XDIST_WORKER" in os.environ:  # its workers share the cores; before torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import trees  # noqa: E402

from data import shapes  # noqa: E402


@pytest.fixture(scope="session")
def golden():
    """Values that the authors' own functions give on seeded inputs."""
    return json.loads((ROOT / "tests" / "golden.json").read_text())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    trees.voc(folder, trees.CLASSES, trees.CLASSES[:12])
    return folder


@pytest.fixture
def few_shapes(monkeypatch):
    """80 and 20 drawn pictures: all classes are among them."""
    monkeypatch.setattr(shapes, "TRAIN", 80)
    monkeypatch.setattr(shapes, "TEST", 20)


@pytest.fixture
def start(monkeypatch, capsys, tmp_path, data):
    """Runs a script in this process; gives exit status, standard output and standard error.

    method      of the script, or the path of another one
    """
    monkeypatch.chdir(tmp_path)

    def run(flags, where=data, method="dkd"):
        if "--data " not in flags:
            flags += f" --data {shlex.quote(str(where))}"
        return trees.launch(method, flags), *capsys.readouterr()

    return run
