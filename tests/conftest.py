import importlib
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU alone repeats bit by bit

import trees  # noqa: E402

import common  # noqa: E402


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
def start(monkeypatch, capsys, tmp_path, data):
    """Runs a script in this process; gives exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(flags, where=data, method="dkd"):
        module = importlib.import_module(method)
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{method}.py"), *shlex.split(flags)])
        if "--data " not in flags:
            sys.argv += ["--data", str(where)]
        with pytest.raises(SystemExit) as stop:
            common.launch(module.main, module.flags())
        return stop.value.code or 0, *capsys.readouterr()

    return run
