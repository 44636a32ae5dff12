"""Faults, a row each: what is damaged, how, which command is started then, and how it ends."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import trees

from data import compare, predict, prepare

RUN = trees.folder_name("dkd", "1-1", "folder")
FLAGS = "--dataset folder --data pets --task 1-1 --backbone small --weights none --crop 32 "
FLAGS += "--output-stride 8 --batch 2 --epochs 6 --memory 2 --workers 0 --save-every 0 "
FLAGS += "--class-order order.txt"
COMMANDS = {"compare": compare, "predict": predict, "prepare": prepare}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with own pictures, a whole run, and the same run stopped inside its last step."""
    place = tmp_path_factory.mktemp("made")
    images = [[1], [2], [3], [1, 3], [2, 3]] * 2
    trees.own(place / "pets", images, [[1, 2], [3], [1]], ["cat", "dog", "horse"])
    (place / "order.txt").write_text("horse\ncat\ndog\n")
    trees.write(place / "photo.jpg", trees.picture(9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        assert trees.launch("dkd", f"{FLAGS} --out whole") == 0
        trees.inside(patch, 2, 13, lambda *_: os.kill(os.getpid(), 15))
        assert trees.launch("dkd", FLAGS) == 143
    (place / RUN / ".notes.2026.txt").write_text("a user's own")
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(text):
    """Exit status of "train" and further flags, or of a command in data/."""
    name, *given = shlex.split(text)
    if name == "train":
        return trees.launch("dkd", f"{FLAGS} {text.removeprefix('train')}")
    return COMMANDS[name].main(given)


# damages: functions of a path


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


def code(path):
    torch.save({"model": Runs()}, path)


def text(content):
    return lambda path: path.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def saved(content):
    return lambda path: torch.save(content, path)


def lacks(key):
    """A checkpoint or JSON file without one of its keys."""

    def damage(path):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            del content[key]
            return path.write_text(json.dumps(content))
        content = torch.load(path, weights_only=True)
        del content[key]
        torch.save(content, path)

    return damage


def has(**changes):
    def damage(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return damage


def replaced(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def older(path):
    """metrics.json as it was before the last step that was finished."""
    content = json.loads(path.read_text())
    content["steps"].pop()
    path.write_text(json.dumps(content))


def flag(**changes):
    """A step_K.pt of a run with other flags."""

    def damage(path):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"flags": content["flags"] | changes}, path)

    return damage


def older_run(path):
    """What the version before wrote: no identity of the data, no results in step_K.pt."""
    for file in path.glob("*.pt"):
        content = torch.load(file, weights_only=True)
        del content["data"]
        content.pop("metrics", None)
        if file.name == "last.pt":
            del content["flags"]
        torch.save(content, file)
    config = json.loads((path / "config.json").read_text())
    config["classes"] = config.pop("data")["classes"]
    (path / "config.json").write_text(json.dumps(config))


def moved(path):
    path.rename(path.with_name("moved"))


def in_all(pattern, damage):
    """A damage of all files that fit, in a folder."""

    def of_all(path):
        for file in path.glob(pattern):
            damage(file)

    return of_all


def other_size(path):
    trees.write(path, trees.mask([1], width=8))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def only(pattern):
    """Of a folder nothing but the files that fit."""

    def damage(path):
        for file in {*path.iterdir()} - {*path.glob(pattern)}:
            file.unlink()

    return damage


def nan(path):
    content = torch.load(path, weights_only=True)
    content["model"]["trunk.conv1.weight"][0] = torch.nan
    torch.save(content, path)


def equals_sign(path):
    (path.parent / "a=b").mkdir()
    path.rename(path.parent / "a=b/c=d")


STRANGE = ("{", "[]", "3", "null", '{"steps": 3}', '{"steps": [3]}', '{"steps": [{}]}', b"\xff\xfe")
ASIDE = "not such a file as a run writes.*set aside as"
TRAIN, PREPARE = "train", "prepare folder --data pets --task 1-1 --class-order order.txt"
STEP0 = f"{TRAIN} --out new --step0 {RUN}/step_0.pt"
WEIGHT = torch.ones(16, 3, 7, 7)
EVAL, PHOTO = f"predict {RUN} --eval", f"predict {RUN} photo.jpg"

# file, damage, command, exit status, words of what is printed
FAULTS = [
    # a run's folder: nothing good is trained again, nothing goes on with other flags
    *((RUN / "metrics.json", damage, "train", 0, "2 steps done") for damage in (gone, older)),
    *((RUN / "metrics.json", text(t), "train", 0, f"metrics.json: {ASIDE}") for t in STRANGE),
    *((RUN / "config.json", text(t), "train", 0, f"config.json: {ASIDE}") for t in STRANGE),
    *(
        (RUN / "memory_2.json", text(t), "train", 0, f"memory_2.json: {ASIDE}")
        for t in STRANGE
        if t != "[]"
    ),
    (RUN / "memory_2.json", text('[["gone.jpg", [1]]]'), "train", 0, f"memory_2.json: {ASIDE}"),
    (RUN, in_all("memory_*.json", text("{")), "train", 2, "memory_1.json: not such a file"),
    (RUN / "config.json", gone, "train", 0, "2 steps done"),
    (RUN / "config.json", gone, "train --lr 1", 2, r"step_0.pt.*lr .* there, \[1.0\] here"),
    (RUN / "metrics.json", gone, "train --lr 1", 2, r"config.json.*lr .* there, \[1.0\] here"),
    (RUN, in_all("*.json", gone), "train --lr 1", 2, r"step_0.pt.*lr .* there, \[1.0\] here"),
    (RUN, in_all("[a-km-z]*", gone), "train --lr 1", 2, r"last.pt.*lr .* there, \[1.0\] here"),
    (RUN / "step_1.pt", has(flags={}), "train", 2, "step_1.pt: of another run"),
    (RUN / "step_1.pt", has(data={"test_images": "9"}), "train", 2, "step_1.pt: of another run"),
    *((RUN / "step_1.pt", d, "train", 0, "step_1.pt.damaged") for d in (cut, empty, flipped, code)),
    *((RUN / "last.pt", d, "train", 0, "last.pt.damaged") for d in (cut, empty, flipped, code)),
    *(
        (RUN / "last.pt", lacks(key), "train", 0, "last.pt.damaged")
        for key in ("model", "optimizer", "step", "iteration", "seconds", "rng", "window")
    ),
    (RUN / "last.pt", has(model={}), "train", 2, "last.pt: of another network or optimiser"),
    (RUN / "last.pt", has(optimizer={}), "train", 2, "last.pt: of another network or optimiser"),
    (RUN / "last.pt", has(window=[3]), "train", 2, "last.pt: of another network or optimiser"),
    (RUN / "last.pt", has(rng=torch.zeros(2)), "train", 2, "last.pt: of another network"),
    (RUN / "last.pt", saved([1]), "train", 0, "last.pt.damaged"),
    (RUN / "last.pt", gone, "train", 0, "2 steps done"),
    (RUN / "train.csv", cut, "train", 0, "train.csv: 1 damaged rows are left out"),
    (RUN / "train.csv", text(b"\xff\xfe\n\n1,2"), "train", 0, "train.csv: 2 damaged rows"),
    (RUN / "train.csv", empty, "train", 0, "goes on at"),
    (RUN / "pictures/predicted_0.png", cut, "train", 0, "goes on at"),
    (RUN / "pictures/predicted_0.png", gone, "train", 0, "goes on at"),
    # other data
    ("pets/train/images/train3.jpg", gone, "train", 2, "training_images 10 .* there, 9 .* here"),
    ("pets/train/masks/train3.png", cut, "train", 2, "train3.png: not a readable mask"),
    ("pets/test/images/test0.jpg", gone, "train", 2, "test_images 3 .* there, 2 .* here"),
    ("order.txt", text("cat\ndog\nhorse"), "train", 2, r"classes\[1\] horse there, cat here"),
    ("pets/classes.txt", text("dog\ncat\nhorse"), "train", 2, r"numbers\[2\] 1 there, 2 here"),
    ("pets/classes.txt", text("cat\ndog\nhorse\nduck"), "train", 2, r"order.txt: .*\['duck'\]"),
    ("pets/classes.txt", text("\ufeffcat\r\ndog\r\nhorse"), "train", 0, "goes on at"),
    ("order.txt", text("\ufeffhorse\ncat\ndog"), "train", 0, "goes on at"),
    ("pets", moved, "train --data moved", 0, "goes on at"),
    ("pets", moved, "train --data ./moved/", 0, "goes on at"),
    # a run is read, never retyped
    ("order.txt", gone, EVAL, 0, "step 1: mIoU"),
    ("order.txt", text("cat\ndog\nhorse"), EVAL, 0, "step 1: mIoU"),
    ("pets/train/images/train3.jpg", gone, EVAL, 0, "step 1: mIoU"),
    ("pets/classes.txt", text("dog\ncat\nhorse"), EVAL, 2, r"numbers\[2\] 1 there, 2 here"),
    ("pets/classes.txt", text("pig\ncat\nhorse"), EVAL, 2, "the run's classes: no class .* 'dog'"),
    ("pets/test/images/test0.jpg", gone, EVAL, 2, "test_images 3 .* there, 2 .* here"),
    ("pets/test/masks/test0.png", cut, EVAL, 2, "test0.png: not a readable mask"),
    (RUN / "step_1.pt", has(flags={}), EVAL, 2, "step_1.pt: not a step_K.pt"),
    (RUN / "step_1.pt", has(data={}, flags={}), EVAL, 2, "step_1.pt: not a step_K.pt"),
    (RUN / "step_1.pt", flag(seed=1), EVAL, 2, "step_1.pt: of another run .seed 1 there, 0 here"),
    (RUN / "step_1.pt", flag(seed=1), "train", 2, "step_1.pt: of another run .seed 1 there"),
    (RUN / "config.json", text("{"), EVAL, 0, "step 1: mIoU"),
    (RUN, older_run, EVAL, 0, "step 1: mIoU"),
    (Path("whole") / RUN.name, older_run, f"compare whole/{RUN.name}", 0, "folder pets"),
    (RUN, older_run, "train", 0, "goes on at"),
    (RUN / "config.json", gone, PHOTO, 0, "photo.jpg: "),
    ("pets", gone, PHOTO, 0, "photo.jpg: "),
    # data that cannot be used, known before training
    ("pets/test/masks/test0.png", other_size, f"{TRAIN} --out new", 2, "test0.png: .* pixels"),
    ("pets/train/masks/train0.png", other_size, f"{TRAIN} --out new", 2, "train0.png: .* pixels"),
    ("pets/train/images/train0.jpg", fifo, f"{TRAIN} --out new", 2, "train0.jpg: .*no regular"),
    ("pets/test/masks/test0.png", fifo, f"{TRAIN} --out new", 2, "test0.png: .*no regular file"),
    ("photo.jpg", fifo, PHOTO, 2, "photo.jpg: .*no regular file"),
    ("photo.jpg", device, PHOTO, 2, "photo.jpg: .*no regular file"),
    ("pets/test/images", only("test0.*"), f"{TRAIN} --dry-run", 0, r"all 0-3 +- +\d"),
    ("pets/test/images", only("test0.*"), PREPARE, 0, "note: no test image for step 0"),
    # prepare counts what can be used, and says what cannot
    *(
        (f"pets/train/{file}", damage, PREPARE, 1, r"(?s)unreadable: 1.*train  6 3 4\n.*1 errors")
        for file in ("images/train0.jpg", "masks/train0.png")
        for damage in (cut, fifo)
    ),
    *(
        (f"pets/test/{file}", damage, PREPARE, 1, r"(?s)unreadable: 1.*test   1 2 2\n.*1 errors")
        for file in ("images/test0.jpg", "masks/test0.png")
        for damage in (cut, fifo)
    ),
    ("pets/train/masks/train0.png", gone, PREPARE, 1, r"(?s)no mask: 1.*train  6 3 4\n"),
    ("pets/train/masks/train0.png", other_size, PREPARE, 1, "differ in size: 1"),
    ("pets/classes.txt", text("\ufeffcat\ndog\nhorse"), PREPARE, 0, "0 errors"),
    ("pets/classes.txt", text(b"\xff\xfe"), PREPARE, 2, "cannot be read as text"),
    # weights
    *(
        ("w.pt", saved(content), f"{TRAIN} --dry-run --weights w.pt", status, words)
        for content, status, words in (
            ({"conv1.weight": WEIGHT}, 0, "trunk    1 tensors from w.pt"),
            ({"module.conv1.weight": WEIGHT}, 0, "trunk    1 tensors from w.pt"),
            ({"state_dict": {"module.conv1.weight": WEIGHT}}, 0, "trunk    1 tensors from w.pt"),
            ({"conv1.weight": WEIGHT / 0}, 2, "--weights w.pt: conv1.weight is not finite"),
            ({"conv1.weight": WEIGHT[0]}, 2, "not weights of small"),
            ({"state_dict": 3}, 2, "not weights of small"),
            ({}, 2, "not weights of small"),
            ([WEIGHT], 2, "not a file of tensors and plain values: it holds other things"),
            ({"conv1.weight": Runs()}, 2, "not a file of tensors and plain values: it holds"),
        )
    ),
    *(
        (
            "w.pt",
            text(content),
            f"{TRAIN} --out new --weights w.pt",
            2,
            "torch.save has not written",
        )
        for content in ("", "text", b"PK\x03\x04", b"\x80\x02.")
    ),
    (RUN / "step_0.pt", nan, STEP0, 2, "is not finite"),
    (RUN / "step_0.pt", has(data={"training_images": "9"}), STEP0, 2, "another training_images"),
    (RUN / "step_0.pt", lacks("flags"), STEP0, 2, "not a step_0.pt"),
    (RUN / "step_0.pt", flipped, STEP0, 2, "not a file of tensors"),
    # names and arguments
    ("photo.jpg", cut, f"predict {RUN} ''", 2, "pictures: empty"),
    ("photo.jpg", cut, "predict '' photo.jpg", 2, "run: empty"),
    ("photo.jpg", cut, f"{TRAIN} --data ''", 2, "data: empty"),
    ("photo.jpg", cut, "compare whole/*", 2, "no results of a run"),
    ("whole", equals_sign, f"compare a=b/c=d/{RUN.name}", 0, "folder pets"),
    ("whole", equals_sign, f"compare mine=a=b/c=d/{RUN.name}", 0, r"\| mine \|"),
    ("photo.jpg", cut, f"compare whole/{RUN.name} --curves no/x.png", 2, "--curves no/x.png"),
    ("photo.jpg", cut, f"compare whole/{RUN.name} --curves x.odd", 2, "--curves x.odd"),
]


def name_of(row):
    file, damage, command, *_ = row
    return f"{Path(file).name}-{getattr(damage, '__qualname__', '').split('.')[0]}-{command[:8]}"


def parameters():
    """The rows. Those that train to the end are slow."""
    for row in FAULTS:
        _, _, command, status, _ = row
        slow = [pytest.mark.slow] * (command.startswith("train") and status == 0)
        yield pytest.param(*row, id=name_of(row), marks=slow)


@pytest.mark.parametrize(("file", "damage", "command", "status", "words"), parameters())
def test_a_fault_is_one_line(place, capsys, file, damage, command, status, words):
    """What stays good goes on bit by bit; what is refused changes nothing that was saved."""
    damage(place / file)
    before = {path: path.read_bytes() for path in place.rglob("*.pt")}
    found = start(command)
    out, err = capsys.readouterr()
    assert found == status and re.search(words, err if status == 2 else out), out + err
    assert len(err.splitlines()) <= (2 if status else 0), err
    assert not re.search("Traceback|code ran|weights_only|\033", out + err)
    assert (RUN / ".notes.2026.txt").exists()
    if command.startswith("train") and not status and "--dry-run" not in command:
        whole = Path("whole") / RUN.name
        assert trees.results(whole) == trees.results(RUN)
        trees.assert_same(trees.weights(whole, 2), trees.weights(RUN, 2))
        assert (RUN / "pictures/predicted_0.png").read_bytes()
    if status:
        assert all(path.read_bytes() == content for path, content in before.items())
