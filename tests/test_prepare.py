"""data/prepare.py: what it finds in a data set, what it counts, and a download of nothing."""

import hashlib
import re
import shutil
import zipfile

import numpy as np
import pytest
import trees
from PIL import Image
from trees import CLASSES

import common
from data import files, prepare


@pytest.fixture
def check(capsys):
    """Runs the command; gives exit status, standard output and standard error."""

    def run(flags, data):
        return prepare.main([*flags.split(), "--data", str(data)]), *capsys.readouterr()

    return run


# faults


def turned(path):
    """A JPEG 32 wide and 24 high that viewers show upright: 24 wide, 32 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(trees.picture(5).astype(np.uint8)).save(path, exif=exif)


def test_every_kind_of_fault_is_named_with_a_file(check, tmp_path):
    """Status 1; the images of the steps are counted without those that cannot be used."""
    base = trees.voc(tmp_path, CLASSES, CLASSES[:12])
    masks, train = base / "SegmentationClassAug", base / "ImageSets/Segmentation/train_aug.txt"
    assert check("voc", tmp_path)[0] == 0
    train.write_text(train.read_text() + "a3\nghost\n")
    (base / "JPEGImages/a0.jpg").unlink()
    trees.write(masks / "a1.png", trees.mask([1], width=8))
    (base / "JPEGImages/a2.jpg").write_bytes(b"nothing")
    trees.write(masks / "a4.png", trees.picture(0))  # colours
    Image.fromarray(trees.mask([1]).astype(np.uint16)).save(masks / "a5.png")  # 16 bits
    turned(base / "JPEGImages/a6.jpg")
    trees.write(masks / "a6.png", trees.mask([1], 32, 24))  # drawn on the upright picture
    (base / "JPEGImages/a7.jpg").write_bytes(b"")
    trees.write(masks / "b1.png", trees.mask([99]))
    status, out, err = check("voc", tmp_path)
    assert (status, err) == (1, "")
    for kind, name in (
        ("no picture: 1", "a0.jpg"),
        ("no mask: 1", "ghost.png"),
        ("listed more than once: 1", "a3.png"),
        ("unreadable: 4", "a2.jpg"),
        ("picture and mask differ in size: 2", "a1.png.*a6.png"),
        ("class numbers beyond 20: 1", "b1.png"),
    ):
        assert re.search(f"error: {kind}, such as .*{name}", out), (kind, out)
    assert "\n  left out of what follows: 9 images\n" in out and out.endswith("\n10 errors\n")


def test_modes_that_are_no_masks_are_named(check, tmp_path):
    base = trees.voc(tmp_path, CLASSES, CLASSES[:12])
    for mode, mask in (("RGB", trees.picture(0)), ("I;16", trees.mask([1]))):
        pixels = mask.astype(np.uint16 if mode == "I;16" else np.uint8)
        Image.fromarray(pixels).save(base / "SegmentationClassAug/a4.png")
        status, out, _ = check("voc", tmp_path)
        assert status == 1 and "a4.png: a mask has one class number per pixel (grey or" in out
        assert f"this has mode {mode}" in out


@pytest.mark.parametrize("file", ["train_aug", "val"])
def test_an_empty_list_is_an_error_at_the_start(check, tmp_path, file):
    base = trees.voc(tmp_path, CLASSES, CLASSES[:12])
    (base / f"ImageSets/Segmentation/{file}.txt").write_text("\n")
    kind = {"train_aug": "training", "val": "test"}[file]
    status, _, err = check("voc", tmp_path)
    assert status == 2 and f"lists no {kind} image" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("voc --task 25-1", "prepare: --task 25-1: expected A-B"),
        ("voc --task ../x", "prepare: --task ../x: expected A-B"),
        ("voc --class-order nowhere.txt", "--class-order nowhere.txt: cannot be read"),
        ("voc --held-out 0.9", "--held-out 0.9: a part of the training images, 0 to 0.5"),
        ("voc --held-out nan", "0 to 0.5"),
        ("ade", "no annotations in any of"),
        ("folder", "classes.txt"),
    ],
)
def test_what_cannot_be_checked_is_status_2_at_once(check, data, monkeypatch, flags, message):
    monkeypatch.setattr(prepare, "check_sample", None)  # no file is read
    status, out, err = check(flags, data)
    assert status == 2 and message in err and out == ""


# counts


def test_images_are_counted_per_step_beside_the_published_lists(check, tmp_path):
    trees.voc(tmp_path, [[1], [1, 16], [16, 17], [18], [19], [20]], [[1], [17]])
    status, out, _ = check("voc", tmp_path)
    assert status == 0 and "6 training and 2 test images" in out and "\n0 errors" in out
    counts = [line.split()[:5] for line in out.splitlines() if line.startswith("  15-1")]
    assert counts == [
        ["15-1", "overlapped", "train", "2*[9568]", "2*[487]"],
        ["15-1", "overlapped", "test", "1*[1240]", "1*[1277]"],
        ["15-1", "disjoint", "train", "1*[8437]", "1*[378]"],
        ["15-1", "disjoint", "test", "1*[1240]", "1*[1277]"],
    ]
    # a task and a setting that no list has come first, without a star
    out = check("voc --task 18-2 --setting disjoint --keep-later", tmp_path)[1]
    assert re.search(r"N\n  18-2 +disjoint +train +4 2\n  18-2 +disjoint +test +2 2\n", out)


def test_an_equal_count_has_no_star(check, tmp_path, monkeypatch):
    trees.voc(tmp_path, [[1], [20]], [[1]])
    row = {"dataset": "voc", "task": "19-1", "setting": "overlapped", "step": "0"}
    tables = {"voc": common.read_table("voc"), "image_counts": [row | {"train": "1", "test": "9"}]}
    monkeypatch.setattr(common, "read_table", tables.get)
    out = check("voc --task 19-1", tmp_path)[1]
    assert "19-1    overlapped  train  1 1\n" in out and "test   1*[9] 1\n" in out


def test_other_images_are_not_held_against_the_lists(check, tmp_path):
    """A permuted class order, a part held out: the published lists are of other images."""
    trees.voc(tmp_path, [[1], [20], [20], [1]], [[1]])
    names = common.class_table("voc")[0][1:]
    (tmp_path / "order.txt").write_text("\n".join(reversed(names)))
    for flags, train in (
        (f"--class-order {tmp_path}/order.txt", "2 0 0 0 0 2"),
        ("--held-out 0.5", "1 0 0 0 0 1"),
    ):
        out = check(f"voc {flags}", tmp_path)[1]
        assert f"15-1    overlapped  train  {train}\n" in out and "*[9" not in out
    order = check(f"voc --task 19-1 --class-order {tmp_path}/order.txt", tmp_path)[1]
    assert "note: 19-1 cannot be run: step 0 has no image of train, sofa, sheep" in order


def test_the_class_that_no_image_shows_is_named(check, tmp_path):
    trees.voc(tmp_path, [[1, 2], [3]], [[1]])
    status, out, _ = check("voc --task 2-18", tmp_path)
    assert status == 0
    assert "note: 2-18 cannot be run: step 1 has no image of boat, bottle, bus" in out


def test_every_data_set_has_a_task_that_fits_it(check, tmp_path, monkeypatch):
    monkeypatch.setattr(common.shapes, "TRAIN", 6)
    monkeypatch.setattr(common.shapes, "TEST", 3)
    trees.ade(tmp_path)
    trees.msrc(tmp_path)
    trees.own(tmp_path, [[1], [2]], [[1]], ["one", "two"])
    tasks = {"ade": "100-50", "msrc": "16-5", "shapes": "15-1", "folder": "offline"}
    for name, task in tasks.items():
        status, out, _ = check(name, tmp_path)
        assert status == 0 and re.search(rf"has N\n  {task} +overlapped +train ", out), out


def test_msrc_colours_that_no_class_has_are_noted(check, tmp_path):
    """Horse and mountain are void, not unknown."""
    base = trees.msrc(tmp_path)
    flags = "msrc --setting sequential"
    assert "note: 16-5 cannot be run: step 0 has no image of building" in check(flags, tmp_path)[1]
    status, out, _ = check(f"{flags} --keep-later", tmp_path)
    assert status == 0 and "note" not in out
    mask = next((base / "GroundTruth").glob("*.bmp"))
    pixels = np.asarray(files.open_image(mask, "mask")).copy()
    pixels[0, 0] = (1, 2, 3)
    Image.fromarray(pixels).save(mask)
    status, out, _ = check(f"{flags} --keep-later", tmp_path)
    assert status == 0 and "note: colours of no class, taken as void: 1, such as" in out
    assert files.read_mask(mask).getpixel((0, 0)) == 255


# own pictures


@pytest.fixture
def pets(tmp_path):
    train, test = [[1], [2], [3], [1, 3], [2, 3]], [[1, 2], [3]]
    return trees.own(tmp_path / "pets", train, test, ["cat", "dog", "", "horse"])


def test_own_pictures_are_checked(check, pets):
    status, out, _ = check("folder --task 2-1", pets)
    assert status == 0 and "5 training and 2 test images" in out and "\n0 errors" in out
    assert re.search(r"2-1 +overlapped +train +4 3\n", out)
    names, colours = common.class_table("folder", pets)
    assert names == ["background", "cat", "dog", "horse"] and len({*colours}) == 4
    (pets / "classes.txt").write_text("cat\ndog\n")  # masks read once are held against it again
    status, out, _ = check("folder --task 1-1", pets)
    assert status == 1 and "error: class numbers beyond 2: 4" in out
    assert "left out of what follows: 4 images" in out
    for text in ("", "cat\ncat", "background\ncat"):
        (pets / "classes.txt").write_text(text)
        status, _, err = check("folder", pets)
        assert status == 2 and "classes.txt: 1 to 254 classes, each once" in err
    (pets / "classes.txt").unlink()
    status, _, err = check("folder", pets)
    assert status == 2 and "DIR/train/masks/x.png" in err


def test_pictures_that_are_left_out_are_not_passed_over(check, pets):
    """A picture of a kind that is not read, a hidden file, a link to nowhere; two for one mask."""
    train = pets / "train"
    first, second = (next((train / "images").glob(f"train{i}.*")) for i in range(2))
    first.rename(first.with_suffix(".heic"))
    (train / "images/._train1.jpg").write_bytes(b"of another system")
    (train / "masks/gone.txt").symlink_to("nowhere")
    status, out, err = check("folder", pets)
    assert (status, err) == (0, "") and "4 training and 2 test images" in out
    assert "note: no picture to this mask: 1, such as" in out and "train0.png" in out
    trees.write(second.with_suffix(".webp"), trees.picture(1))
    status, _, err = check("folder", pets)
    assert status == 2 and "train1.png: the mask of two pictures" in err


def test_masks_that_are_not_there_are_errors_of_files(check, pets):
    (pets / "train/masks/train1.png").unlink()
    status, out, _ = check("folder", pets)
    assert status == 1 and "error: no mask: 1" in out and "train/masks/train1.png" in out
    (pets / "test/masks").rename(pets / "elsewhere")
    status, out, err = check("folder", pets)
    assert (status, err) == (1, "") and "error: no mask: 3" in out


# download


def test_where_msrc_comes_from(check, tmp_path):
    status, out, _ = check("msrc --download", tmp_path)
    assert status == 0 and "TextonBoostSplits.zip" in out and "## " not in out
    assert not [*tmp_path.glob("*/")]


def zipped(path, members):
    """A zip file of {name: bytes}; gives its URL."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.as_uri()


@pytest.fixture
def ade_file(tmp_path, monkeypatch):
    """The file that `prepare` fetches as ADE20K's."""
    there = trees.ade(tmp_path / "there").parent
    files = {str(f.relative_to(there)): f.read_bytes() for f in there.rglob("*.*")}
    monkeypatch.setattr(prepare, "ADE", zipped(tmp_path / "ade.zip", files))
    digest = hashlib.sha1((tmp_path / "ade.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "ADE_SHA1", digest)
    return tmp_path / "ade.zip"


def test_ade_is_fetched_once_and_checked(check, tmp_path, ade_file):
    for _ in range(2):
        status, out, _ = check("ade --download", tmp_path / "data")
        assert status == 0 and "2 training and 1 test images" in out and "\n0 errors" in out
        ade_file.unlink(missing_ok=True)
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["ADEChallengeData2016"]


@pytest.mark.parametrize("fault", ["no network", "another file", "cut off"])
def test_a_file_that_cannot_be_had_leaves_nothing(check, tmp_path, ade_file, monkeypatch, fault):
    content = ade_file.read_bytes()
    if fault == "no network":
        ade_file.unlink()
    else:
        ade_file.write_bytes(content[:-9] if fault == "cut off" else content + b" ")
    status, out, err = check("ade --download", tmp_path / "data")
    reason = "cannot be fetched" if fault == "no network" else "another file than expected"
    line = next(line for line in err.splitlines() if line.startswith("prepare: --download: "))
    assert (status, out) == (2, "") and reason in line
    assert "\nDIR/ADEChallengeData2016/images/training/" in err
    assert not [*(tmp_path / "data").iterdir()]


@pytest.fixture
def voc_files(tmp_path, monkeypatch):
    """What `prepare` fetches as VOC 2012 and its masks; gives the masks' zip file."""
    there = trees.voc(tmp_path / "there", [[1], [2]], [[3]], train_list=False)
    names = {"a0": "2007_000001", "a1": "2008_000002", "b0": "2009_000003"}
    masks = {k: (there / f"SegmentationClassAug/{k}.png").read_bytes() for k in names}
    shutil.rmtree(there / "SegmentationClassAug")
    for old, new in names.items():
        (there / f"JPEGImages/{old}.jpg").rename(there / f"JPEGImages/{new}.jpg")
    (there / "ImageSets/Segmentation/val.txt").write_text("2009_000003\n")
    members = {f"SegmentationClassAug/{new}.png": masks[old] for old, new in names.items()}
    members |= {"__MACOSX/._2007_000001.png": b"", "../../2007_000001.txt": b"", "a/": b""}
    monkeypatch.setattr(prepare, "VOC_MASKS", zipped(tmp_path / "masks.zip", members))
    monkeypatch.setattr(prepare, "VOC_MASK_COUNT", 3)

    def voc(root, year, part, download):
        assert (year, part, download) == ("2012", "trainval", True)
        shutil.copytree(tmp_path / "there", root, dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", voc)
    return tmp_path / "masks.zip"


def test_voc_and_its_masks_are_fetched_once(check, tmp_path, voc_files, monkeypatch):
    for _ in range(2):
        status, out, _ = check("voc --download --task 1-19", tmp_path / "data")
        assert status == 0 and "2 training and 1 test images" in out and "\n0 errors" in out
        voc_files.unlink(missing_ok=True)
        monkeypatch.setattr("torchvision.datasets.VOCSegmentation", None)
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["VOCdevkit"]
    masks = tmp_path / "data/VOCdevkit/VOC2012/SegmentationClassAug"
    assert len([*masks.iterdir()]) == 3 and not [*tmp_path.rglob("2007_000001.txt")]


def test_another_number_of_masks_is_refused(check, tmp_path, voc_files, monkeypatch):
    monkeypatch.setattr(prepare, "VOC_MASK_COUNT", 12_031)
    status, _, err = check("voc --download", tmp_path)
    assert status == 2 and "3 masks, 0 of val.txt not among them; expected 12031 and 0" in err
    assert not (tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug").exists()


def test_without_network_voc_is_one_line_and_its_tree(check, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", fail)
    status, _, err = check("voc --download", tmp_path)
    assert status == 2 and err.startswith("prepare: --download: no route to host. The same")
    assert "\nDIR/VOCdevkit/VOC2012/SegmentationClassAug/" in err
