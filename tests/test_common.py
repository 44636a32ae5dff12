"""Tasks, data, model, metric, schedule: in the order of common.py; dense losses: test_dense.py."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import trees
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import common
from common import InputError, Step
from data import files, shapes

slow = pytest.mark.slow

# tasks


@pytest.mark.parametrize(
    ("task", "classes", "new"),
    [
        ("15-1", 20, [15, 1, 1, 1, 1, 1]),
        ("15-5", 20, [15, 5]),
        ("19-1", 20, [19, 1]),
        ("5-3", 20, [5, 3, 3, 3, 3, 3]),
        ("10-4", 20, [10, 4, 4, 2]),
        ("100-50", 150, [100, 50]),
        ("100-1", 150, [100, *[1] * 50]),
        ("16-1", 21, [16, 1, 1, 1, 1, 1]),
        ("offline", 21, [21]),
    ],
)
def test_steps_hold_every_class_once(task, classes, new):
    steps = common.task_steps(task, classes)
    assert [len(step.new) for step in steps] == new
    assert [c for step in steps for c in step.new] == [*range(1, classes + 1)]
    assert [step.index for step in steps] == [*range(len(new))]
    for step in steps:
        assert [*step.old] == [*range(1, step.first)]
        assert step.channels == 1 + len(step.old) + len(step.new)


@pytest.mark.parametrize(
    "task", ["25-1", "20-1", "0-5", "15-0", "abc", "15", "-1-2", "15-1-1", "1²-1"]
)
def test_impossible_tasks_are_refused(task):
    with pytest.raises(InputError, match="expected A-B"):
        common.task_steps(task, 20)


def test_class_order(tmp_path):
    file = tmp_path / "order.txt"
    file.write_text("cat\n3\n\nsea horse\n")
    assert common.class_order(str(file), ["sea horse", "cat", "dog"]) == [2, 3, 1]
    assert common.class_order(None, ["cat", "dog"]) == [1, 2]
    for text, message in (("cat\ncow\ndog", "'cow'"), ("cat\ncat\n3", "repeated .'cat'.")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            common.class_order(str(file), ["sea horse", "cat", "dog"])
    with pytest.raises(InputError, match="cannot be read"):
        common.class_order(str(tmp_path / "none"), ["cat"])


def test_published_class_orders():
    """By name; of MiB's two orders of ADE20K, 50-50, 100-50 and 100-10 are all parts."""
    names = {"voc": [*map(str, range(1, 21))], "ade": [*map(str, range(1, 151))]}
    assert common.class_order("b", names["voc"])[-5:] == [17, 3, 6, 18, 10]  # 15-5s_b of PLOP
    assert common.class_order("w", names["voc"])[:3] == [1, 2, 12]
    assert common.class_order("c", names["ade"])[100:102] == [3, 4]  # 100-10c of MiB
    for row in common.read_table("orders"):
        names = [*map(str, range(1, int(row["classes"]) + 1))]
        assert len(common.class_order(row["name"], names)) == len(names)
    with pytest.raises(InputError, match="--class-order d: cannot be read"):  # ADE20K has none
        common.class_order("d", names)


# data: its tables and files


def test_tables_of_classes():
    for dataset, classes in (("voc", 20), ("ade", 150), ("msrc", 21), ("shapes", 20)):
        assert [int(row["id"]) for row in files.read_table(dataset)] == [*range(1, classes + 1)]
        names, colours = common.class_table(dataset)
        assert len({*names}) == len({*colours}) == classes + 1
    names, colours = common.class_table("voc")
    assert names[20] == "tvmonitor" and colours[1] == (128, 0, 0)


def test_bad_masks_are_named(tmp_path):
    trees.write(tmp_path / "rgb.png", trees.picture(0))
    trees.write(tmp_path / "beyond.png", trees.mask([21]))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, message in (
        ("rgb", "mode RGB"),
        ("beyond", "class number 21"),
        ("broken", "not a readable mask"),
        ("none", "no such mask"),
    ):
        with pytest.raises(InputError, match=message) as error:
            files.classes_in_image([(tmp_path / f"{name}.png",) * 2], 20)
        assert f"{name}.png" in str(error.value)


def classes_in(masks):
    """The masks stand for their pictures, too."""
    return files.classes_in_image([(mask, mask) for mask in masks], 20)


def test_classes_in_images_notice_changed_added_and_removed_files(tmp_path, monkeypatch):
    base = trees.voc(tmp_path, [[1], [2]], [[3]])
    masks = sorted((base / "SegmentationClassAug").glob("a*.png"))
    read = []
    original = files.read_mask
    monkeypatch.setattr(files, "read_mask", lambda p: (read.append(p.name), original(p))[1])
    assert classes_in(masks) == [[1], [2]]
    assert classes_in(masks) == [[1], [2]] and len(read) == 2
    trees.write(masks[0], trees.mask([4, 5]))
    os.utime(masks[0], ns=(1, 1))
    assert classes_in(masks) == [[4, 5], [2]] and read[2:] == ["a0.png"]
    trees.write(base / "SegmentationClassAug/a2.png", trees.mask([7]))
    masks.append(base / "SegmentationClassAug/a2.png")
    assert classes_in(masks) == [
        [4, 5],
        [2],
        [7],
    ] and read[3:] == ["a2.png"]
    masks.pop(0).unlink()
    assert classes_in(masks) == [[2], [7]] and len(read) == 4


def test_classes_in_images_without_a_place_for_the_cache_or_with_a_broken_one(
    tmp_path, monkeypatch
):
    base = trees.voc(tmp_path, [[1], [2]], [[3]])
    masks = sorted((base / "SegmentationClassAug").glob("a*.png"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert classes_in(masks) == [[1], [2]]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert classes_in(masks) == [[1], [2]]
    (cache,) = (tmp_path / "other/ciss").glob("*.json")
    for damage in ("", "[]", '{"a0.png": 3}', '{"a0.png": []}'):
        cache.write_text(damage)
        assert classes_in(masks) == [[1], [2]]
    assert json.loads(cache.read_text())["a0.png"][1] == [1]


class Runs:
    """Unpickling this would call print."""

    def __reduce__(self):
        return print, ("code ran",)


def test_files_are_data_never_code(tmp_path, capsys):
    file = tmp_path / "evil.pt"
    torch.save({"model": Runs()}, file)
    with pytest.raises(InputError, match="not a file of tensors"):
        files.read_checkpoint(file, "--step0")
    file.write_bytes(b"garbage")
    with pytest.raises(InputError, match="not a file of tensors"):
        files.read_checkpoint(file, "--step0")
    assert "code ran" not in capsys.readouterr().out


# data: lists


def test_voc_lists(tmp_path):
    base = trees.voc(tmp_path, [[1], [2, 20]], [[3]])
    source = common.list_samples("voc", str(tmp_path))
    assert [s[1].name for s in source.train] == ["a0.png", "a1.png"]
    assert [s[0].name for s in source.test] == ["b0.jpg"]
    lists = base / "ImageSets/Segmentation"
    lines = "/JPEGImages/a1.jpg /SegmentationClassAug/a1.png\n../../a0\n"
    (lists / "train_aug.txt").write_text(lines)
    source = common.list_samples("voc", str(base))
    assert [s[1] for s in source.train] == [base / f"SegmentationClassAug/a{i}.png" for i in (1, 0)]
    (lists / "train_aug.txt").unlink()
    assert [s[1].stem for s in common.list_samples("voc", str(tmp_path)).train] == ["a0", "a1"]


def test_ade_and_msrc(tmp_path):
    trees.ade(tmp_path)
    source = common.list_samples("ade", str(tmp_path))
    assert files.classes_in_image(source.train, 150) == [[1], [2, 150]]
    for ending in ("bmp", "jpg"):
        root = tmp_path / ending
        trees.msrc(root, ending)
        source = common.list_samples("msrc", str(root))
        assert len(source.train) == 4 and len(source.test) == 1
        assert all(picture.exists() for picture, _ in source.train)
        sets = files.classes_in_image(source.train, 21)
        assert sets == [[*range(1, 21)]] * 2 + [[1, 21]] * 2
        found = np.unique(np.asarray(files.read_mask(source.train[2][1])))
        assert found.tolist() == [1, 21, 255]  # black and horse are void


def test_own_pictures(tmp_path):
    trees.own(tmp_path, [[1], [2, 3]], [[3]], ["cat", "dog", "", "horse"])
    source = common.list_samples("folder", str(tmp_path))
    assert [s[0].name for s in source.train] == ["train0.jpg", "train1.png"]
    assert files.classes_in_image(source.train, 3) == [[1], [2, 3]]
    assert [s[1].name for s in source.test] == ["test0.png"]
    names, colours = common.class_table("folder", str(tmp_path))
    assert names == ["background", "cat", "dog", "horse"] and len({*colours}) == 4
    for text in ("", "cat\ncat", "background\ncat"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(InputError, match=r"classes.txt: 1 to 254 classes, each once"):
            common.class_table("folder", str(tmp_path))


def test_held_out_is_a_part_of_the_training_images():
    everything = common.list_samples("shapes", "")
    source = common.list_samples("shapes", "", held_out=0.2)
    assert len(source.test) == 200 and len(source.train) == 800
    assert sorted(source.train + source.test) == everything.train


def test_a_missing_data_set_is_explained(tmp_path):
    with pytest.raises(InputError) as error:
        common.list_samples("voc", str(tmp_path))
    text = str(error.value)
    assert f"{tmp_path / 'VOCdevkit/VOC2012'}" in text and "--download" in text
    assert "--dataset shapes" in text and len(text.splitlines()) < 20


def test_shapes_hold_old_new_and_future_classes_together():
    sets = files.classes_in_image([(i, i) for i in range(shapes.TRAIN)], 20)
    assert {c for ids in sets for c in ids} == {*range(1, 21)}
    assert all(1 <= len(ids) <= 4 for ids in sets)
    images = Counter(c for ids in sets for c in ids)
    assert min(images.values()) > 60
    mixed = [ids for ids in sets if 17 in ids and min(ids) < 16 and max(ids) > 17]
    assert len(mixed) >= 15
    assert shapes.draw(3)[0].tobytes() != shapes.draw(-3)[0].tobytes()


@pytest.fixture(scope="module")
def voc_sets(tmp_path_factory):
    source = common.list_samples("voc", str(Path(os.environ["CISS_DATA"]) / "voc-masks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return [files.classes_in_image(part, 20) for part in (source.train, source.test)]


@pytest.mark.skipif("CISS_DATA" not in os.environ, reason="needs real data in $CISS_DATA")
@pytest.mark.parametrize("task", ["19-1", "15-5", "15-1", "10-1", "5-3"])
@pytest.mark.parametrize("setting", ["overlapped", "disjoint"])
def test_image_counts_of_voc_equal_the_published_lists(voc_sets, task, setting):
    train, test = voc_sets
    rows = [
        (int(r["train"]), int(r["test"]))
        for r in files.read_table("image_counts")
        if (r["dataset"], r["task"], r["setting"]) == ("voc", task, setting)
    ]
    assert rows == [
        (len(common.images_of_step(train, step, setting)), len(common.test_images(test, step)))
        for step in common.task_steps(task, 20)
    ]


@pytest.mark.skipif("CISS_DATA" not in os.environ, reason="needs real data in $CISS_DATA")
def test_real_msrc_and_ade():
    source = common.list_samples("msrc", str(Path(os.environ["CISS_DATA"]) / "msrc"))
    assert len(source.train) == 335 and len(source.test) == 256
    sets = files.classes_in_image(source.train, 21)
    assert {c for ids in sets for c in ids} == {*range(1, 22)}
    source = common.list_samples("ade", str(Path(os.environ["CISS_DATA"]) / "ade"))
    assert all(files.classes_in_image(source.test, 150))


# data: which images, which labels


def test_images_of_a_step_on_a_hand_made_set():
    sets = [[1], [2], [1, 2], [3], [2, 3], [1, 3], []]
    steps = common.task_steps("1-1", 3)
    overlapped = [common.images_of_step(sets, s, "overlapped") for s in steps]
    assert overlapped == [[0, 2, 5], [1, 2, 4], [3, 4, 5]]
    for setting in ("disjoint", "sequential"):
        images = [common.images_of_step(sets, s, setting) for s in steps]
        assert images == [[0], [1, 2], [3, 4, 5]]
        kept = [common.images_of_step(sets, s, setting, keep_later=True) for s in steps]
        assert kept == overlapped
    assert [common.test_images(sets, s) for s in steps] == [[0, 2, 5], [0, 1, 2, 4, 5], [*range(6)]]


@pytest.mark.parametrize("code", ["mib", "plop"])
def test_images_and_labels_equal_the_published_loaders(golden, code):
    """What MiB's and PLOP's data sets gave for fourteen label maps, in all steps of 15-1."""
    sets, order = golden["labels"]["class_sets"], [*range(1, 21)]
    for name, steps in golden["labels"][code].items():
        for index, expected in steps.items():
            step = common.task_steps("15-1", 20)[int(index)]
            setting = name.removeprefix("voc_15-1_")
            if setting == "test":
                images = common.test_images(sets, step)
                table = common.test_labels(order, step, ["later"] * (code == "mib"))
            else:
                images = common.images_of_step(sets, step, setting)
                table = common.train_labels(order, step, setting, ["void"] * (code == "plop"))
            if code == "mib" and setting == "test":
                table[0] = 0  # MiB ignores 0 on ADE20K only
            labels = {str(i): table[[0, *sets[i], 255]].tolist() for i in images}
            assert labels == expected, (name, index)


def test_labels_of_a_permuted_order():
    """19-1b: class 5 is learned last, and is class 20 then."""
    order = [*range(1, 5), *range(6, 21), 5]
    first, last = common.task_steps("19-1", 20)
    table = common.train_labels(order, first, "overlapped", ["void"])
    assert table[[0, 1, 4, 5, 6, 20, 255]].tolist() == [0, 1, 4, 0, 5, 19, 255]
    table = common.train_labels(order, last, "overlapped", ["void"])
    assert table[[0, 1, 4, 5, 6, 20, 255]].tolist() == [0, 0, 0, 20, 0, 0, 255]
    table = common.test_labels(order, last, [])
    assert table[[0, 1, 4, 5, 6, 20, 255]].tolist() == [0, 1, 4, 20, 5, 19, 255]


def test_settings_void_and_other():
    order, step = [*range(1, 21)], Step(1, 16, 17)
    masked = common.train_labels(order, step, "disjoint", [])
    assert masked[[0, 3, 16, 17, 18, 255]].tolist() == [0, 0, 16, 17, 0, 0]
    shown = common.train_labels(order, step, "sequential", ["void"])
    assert shown[[0, 3, 16, 17, 18, 255]].tolist() == [0, 3, 16, 17, 0, 255]
    ignored = common.train_labels(order, step, "sequential", ["void"], later=255)
    assert ignored[[0, 3, 16, 17, 18, 255]].tolist() == [0, 3, 16, 17, 255, 255]
    ade = common.test_labels([*range(1, 151)], Step(0, 1, 100), ["later", "other"])
    assert ade[[0, 1, 100, 101, 150]].tolist() == [255, 1, 100, 255, 255]
    for setting in ("overlapped", "disjoint", "sequential"):
        table = common.train_labels(order, step, setting, ["void"])
        assert {*table.tolist()} <= {
            0,
            *step.new,
            255,
            *(step.old if setting == "sequential" else ()),
        }


# data: views


def test_the_crop_has_the_published_distribution():
    """Area fraction: mean 0.71, median 0.67, 10th percentile 0.53; the whole image 14 %."""
    rng = np.random.default_rng(0)
    boxes = np.array([common.crop_box(500, 375, rng) for _ in range(20000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    whole = (w == 500) & (h == 375)
    area = w * h / (500 * 375)
    assert whole.mean() == pytest.approx(0.14, abs=0.02)
    assert area.mean() == pytest.approx(0.71, abs=0.02)
    assert np.median(area) == pytest.approx(0.67, abs=0.02)
    assert np.percentile(area, 10) == pytest.approx(0.53, abs=0.02)
    assert common.crop_box(1000, 10, np.random.default_rng(0)) == (493, 0, 506, 10)


def test_picture_and_label_are_cut_alike():
    """A picture that shows its own labels still shows them after crop, resize and flip."""
    value = np.kron(np.arange(48).reshape(6, 8), np.ones((40, 40))).astype(np.uint8)
    picture, mask = Image.fromarray(np.stack([value] * 3, 2)), Image.fromarray(value)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        seen, labels = common.train_view(picture, mask, 96, rng)
        same = np.abs(np.asarray(seen)[..., 0].astype(int) - np.asarray(labels)) <= 1
        assert same.mean() > 0.85  # all but the seams, which the picture blends


def test_the_test_view_is_resize_and_centre_crop():
    """One resize call with a box gives what torchvision's two transforms give."""
    reference = v2.Compose([v2.Resize(48), v2.CenterCrop(48)])
    nearest = v2.Compose([v2.Resize(48, v2.InterpolationMode.NEAREST), v2.CenterCrop(48)])
    rng = np.random.default_rng(0)
    for width, height in [(100, 75), (75, 100), (64, 64), (48, 48), (50, 333), (97, 61), (30, 41)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        mask = Image.fromarray(rng.integers(0, 21, (height, width), np.uint8))
        ours, labels = common.test_view(picture, mask, 48)
        difference = np.abs(np.asarray(ours, int) - np.asarray(reference(picture), int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (width, height)
        assert (np.asarray(labels) == np.asarray(nearest(mask))).mean() > 0.999, (width, height)


def test_a_training_view_depends_on_its_key_alone():
    samples, labels = [(i, i) for i in range(4)], np.arange(256, dtype=np.uint8)
    view = common.View(samples, labels, 32, (5, 1))
    first = [view[2, 3][0], view[2, 1][0]]
    again = common.View(samples, labels, 32, (5, 1))
    assert (again[2, 1][0] == first[1]).all() and (again[2, 3][0] == first[0]).all()
    for other in (
        common.View(samples, labels, 32, (6, 1)),
        common.View(samples, labels, 32, (5, 2)),
    ):
        assert (other[2, 1][0] != first[1]).any()
    assert (view[3, 1][0] != first[1]).any()
    assert first[0].dtype == torch.uint8 and first[0].shape == (32, 32, 3)


def test_every_sample_of_a_view_has_its_own_labels():
    plain, none = np.arange(256, dtype=np.uint8), np.full(256, 7, np.uint8)
    view = common.View([(3, 3), (3, 3)], np.stack([plain, none]), 32)
    assert view[0, 0][1].unique().numel() > 1 and view[0, 1][1].unique().tolist() == [7]
    assert torch.equal(view[0, 0][0], view[0, 1][0])


def test_a_mask_of_another_size_than_its_picture_is_named(tmp_path):
    trees.write(tmp_path / "x.png", trees.picture(0, 24, 32))
    trees.write(tmp_path / "y.png", trees.mask([1], 24, 30))
    view = common.View([(tmp_path / "x.png", tmp_path / "y.png")], np.zeros(256, np.uint8), 32)
    with pytest.raises(InputError, match=r"y.png: \(30, 24\) pixels, its picture has \(32, 24\)"):
        view[0, 0]


def test_data_of_a_task(few_shapes, tmp_path):
    """Class ids are positions in the class order: here the data set's ids backwards."""
    (tmp_path / "order.txt").write_text("\n".join(map(str, range(20, 0, -1))))
    flags = f"--dataset shapes --task 15-5 --class-order {tmp_path}/order.txt --crop 32 --seed 4"
    data = common.Data(trees.arguments("dkd", flags))
    names, colours = common.class_table("shapes")
    assert data.names == [names[0], *names[:0:-1]] and data.colours[1] == colours[20]
    assert data.steps == common.task_steps("15-5", 20)
    assert (data.where, len(data.train), len(data.test)) == ("drawn", 80, 20)
    raw = files.classes_in_image([(i, i) for i in range(80)], 20)
    assert data.classes == [[21 - c for c in ids] for ids in raw]
    step = data.steps[1]
    assert data.images[1] == [i for i, ids in enumerate(raw) if min(ids) <= 5]
    assert data.labels(step)[[20, 6, 5, 1]].tolist() == [0, 0, 16, 20]
    assert data.labels(step, "sequential")[[20, 6, 5, 1]].tolist() == [1, 15, 16, 20]

    view, indices = data.training(step)
    assert indices == data.images[1] and view.seed == (4, 1) and len(view.samples) == 80
    own = np.full(256, 9, np.uint8)
    view, indices = data.training(step, memory=[(3, own), (5, own)])
    assert indices == [*data.images[1], 80, 81] and view.samples[80:] == [(3, 3), (5, 5)]
    assert view[0, 81][1].unique().tolist() == [9]
    assert view[0, indices[0]][1].unique().tolist() != [9]
    assert data.training(step, own)[0][0, indices[0]][1].unique().tolist() == [9]

    view, indices = data.testing(data.steps[0])
    assert view.seed is None and view.samples == data.test
    assert indices == [i for i, ids in enumerate(data.test_classes) if min(ids) <= 15]


def test_a_step_without_an_image_of_a_class_is_refused(tmp_path):
    trees.voc(tmp_path, [[c] for c in range(1, 20)] + [[19, 20]], [[1]])
    flags = f"{trees.TINY} --task 18-1 --data {tmp_path}"
    assert [len(i) for i in common.Data(trees.arguments("dkd", flags)).images] == [18, 2, 1]
    (tmp_path / "order.txt").write_text("\n".join(map(str, [20, *range(1, 20)])))
    flags += f" --setting disjoint --class-order {tmp_path}/order.txt"
    with pytest.raises(InputError, match=r"step 0 .* has no image of tvmonitor.* or --keep-later"):
        common.Data(trees.arguments("dkd", flags))
    common.Data(trees.arguments("dkd", f"{flags} --keep-later"))
    assert common.classes_without_images([0, 1], [[1], [2, 4], [3]], Step(1, 2, 4)) == [3]


def test_msrc_ignores_later_classes_where_old_ones_are_shown(tmp_path):
    trees.msrc(tmp_path)
    flags = f"--dataset msrc --task 20-1 --data {tmp_path}"
    data = common.Data(trees.arguments("ilt", flags))
    for setting, later in (("sequential", 255), ("overlapped", 0)):
        assert data.labels(data.steps[0], setting)[[0, 20, 21]].tolist() == [0, 20, later]


def test_epochs_are_full_batches_and_independent_of_interruption():
    indices, seed = [3, 5, 7, 9, 11, 13, 15], (0, 1)
    keys = [*common.epoch_keys(indices, 2, seed, 0, 9)]
    assert all(len(batch) == 2 for batch in keys)
    for epoch in range(3):
        seen = [i for batch in keys[3 * epoch : 3 * epoch + 3] for e, i in batch if e == epoch]
        assert len({*seen}) == 6 and {*seen} < {*indices}
    assert [*common.epoch_keys(indices, 2, seed, 4, 9)] == keys[4:]
    small = [*common.epoch_keys([1, 2], 8, seed, 0, 3)]  # fewer images than the batch
    assert [sorted(i for _, i in batch) for batch in small] == [[1, 2]] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_normalised_and_in_order(workers):
    args = trees.arguments("dkd", f"--dataset shapes --batch 2 --workers {workers}")
    view = common.View([(i, i) for i in range(5)], np.arange(256, dtype=np.uint8), 32)
    batches = [*common.load_in_order(view, [4, 1, 3], args)]
    assert [len(images) for images, _ in batches] == [2, 1]
    for (images, labels), indices in zip(batches, ([4, 1], [3]), strict=True):
        assert (
            images.is_contiguous(memory_format=torch.channels_last) and labels.dtype == torch.int64
        )
        for image, label, i in zip(images, labels, indices, strict=True):
            picture, own = view[0, i]
            expected = v2.functional.normalize(
                picture.permute(2, 0, 1) / 255, common.MEAN, common.STD
            )
            assert torch.allclose(image, expected, atol=1e-5) and torch.equal(label, own.long())


# model


@pytest.mark.parametrize("backbone", [*common.RESNETS, "mobilenet_v2"])
@pytest.mark.parametrize("stride", [8, 16])
def test_shapes_of_logits_and_features(backbone, stride):
    model = common.DeepLabV3(backbone, stride, [3, 2]).eval()
    with torch.no_grad():
        logits, features = model(torch.randn(1, 3, 97, 65))
    assert common.upsample(logits, (97, 65)).shape == (1, 6, 97, 65)
    strides = (4, 8, stride if stride == 8 else 16, stride)
    size = lambda s: (-(-97 // s), -(-65 // s))  # noqa: E731
    for kind in ("stages", "before_relu"):
        assert [f.shape[2:] for f in features[kind]] == [size(s) for s in strides]
    assert len(features["branches"]) == 5
    assert features["head"].shape[2:] == logits.shape[2:] == size(stride)
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    assert (features["head"] >= 0).all()
    for after, before in zip(features["stages"], features["before_relu"], strict=True):
        expected = before if backbone == "mobilenet_v2" else before.relu()
        assert (after == expected).all()


@pytest.mark.parametrize("stride", [8, 16])
def test_the_trunk_computes_what_torchvisions_does(stride):
    model = common.DeepLabV3("resnet50", stride, [1]).eval()
    reference = torchvision.models.resnet50(
        replace_stride_with_dilation=[False, stride == 8, True]
    ).eval()
    reference.load_state_dict(model.trunk.state_dict(), strict=False)
    wanted = {"layer1": "1", "layer4": "4"}
    getter = torchvision.models._utils.IntermediateLayerGetter(reference, wanted)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, stages = getter(x), model(x)[1]["stages"]
    assert torch.allclose(stages[0], expected["1"], atol=1e-5)
    assert torch.allclose(stages[3], expected["4"], atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_convolution_of_a_dilated_stage(first):
    """Dilated like the others, or by half, as in torchvision."""
    model = common.DeepLabV3("resnet50", 8, [1], dilate_first=first)
    for stage, rate in ((model.trunk.layer3, 2), (model.trunk.layer4, 4)):
        rates = [block.conv2.dilation[0] for block in stage]
        assert rates == [rate if first else rate // 2] + [rate] * (len(stage) - 1)
        assert all(conv.stride == (1, 1) for conv in stage.modules() if isinstance(conv, nn.Conv2d))


def test_mobilenet_is_torchvisions_with_dilated_last_stage():
    model = common.DeepLabV3("mobilenet_v2", 16, [1])
    dilated = [m for m in model.trunk.modules() if getattr(m, "dilation", (1, 1)) == (2, 2)]
    assert len(dilated) == 3  # the blocks behind the one that lost its stride
    reference = torchvision.models.mobilenet_v2().features[:18].state_dict()
    assert {f"features.{k}" for k in reference} == {*model.trunk.state_dict()}


@pytest.mark.parametrize(
    "backbone", ["swin_t", *(pytest.param(f"swin_{k}", marks=slow) for k in "sb")]
)
def test_swin_is_torchvisions(backbone):
    """Its last map is what torchvision pools; the others are normalised, and lie as all maps do."""
    model = common.DeepLabV3(backbone, 32, [3, 2]).eval()
    reference = torchvision.models.get_model(backbone, weights=None)
    assert {*reference.state_dict()} - {*model.trunk.state_dict()} == {"head.weight", "head.bias"}
    reference.load_state_dict(model.trunk.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        logits, features = model(x)
        expected = reference.eval().norm(reference.features(x)).permute(0, 3, 1, 2)
    maps = features["stages"]
    assert torch.equal(maps[3], expected) and logits.shape == (1, 6, 3, 2)
    assert [m.shape[2:] for m in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert all(a is b for a, b in zip(maps, features["before_relu"], strict=True))
    for kept in maps[:3]:
        assert torch.allclose(kept.mean(1), torch.zeros(1), atol=1e-5)
        assert torch.allclose(kept.var(1, correction=0), torch.ones(1), atol=1e-2)


def test_swin_has_stride_32_and_no_other():
    assert trees.arguments("icd", "--backbone swin_b").output_stride == 32
    for flags in ("--backbone swin_t --output-stride 16", "--output-stride 32"):
        with pytest.raises(InputError, match="Swin has 32, all others have 8 or 16"):
            trees.arguments("dkd", flags)


def test_growing_leaves_the_old_outputs_unchanged():
    torch.manual_seed(0)
    old = common.DeepLabV3("small", 8, [3, 1]).eval()
    new = common.DeepLabV3("small", 8, [3, 1, 2]).eval()
    missing = new.load_state_dict(old.state_dict(), strict=False).missing_keys
    assert missing == ["classifiers.3.weight", "classifiers.3.bias"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        a, b = old(x)[0], new(x)[0]
    assert a.shape[1] == 5 and b.shape[1] == 7 and (a == b[:, :5]).all()
    assert new.weight().shape == (7, 64)


def test_the_flags_make_the_network():
    args = trees.arguments("ucd", "--dataset shapes --dilate-first")
    args.dropout, args.bn_momentum = 0.3, 0.07
    model = common.build_model(args, [3, 1])
    assert [len(c.bias) for c in model.classifiers] == [1, 3, 1]
    assert model.aspp.project[3].p == 0.3 and not model.bf16
    assert model.trunk.layer4[0].conv1.dilation == (4, 4)
    norms = [m for m in model.trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.07} and model.head[1].momentum == 0.1


def test_trunk_weights_whole_in_part_and_wrong(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    file = tmp_path / "resnet18.pth"
    model = common.DeepLabV3("resnet18", 16, [1])
    torch.save(state, file)
    assert common.load_trunk(model, "resnet18", str(file)).endswith("random stay: none")
    assert (model.trunk.layer4[1].conv2.weight == state["layer4.1.conv2.weight"]).all()
    torch.save({k: v for k, v in state.items() if k != "layer4.1.conv2.weight"}, file)
    assert common.load_trunk(model, "resnet18", str(file)).endswith("stay: layer4.1.conv2.weight")
    model = common.DeepLabV3("resnet50", 16, [1])
    for content, message in (({"a": torch.ones(1)}, "none of its names"), (state, "another shape")):
        torch.save(content, file)
        with pytest.raises(InputError, match=message):
            common.load_trunk(model, "resnet50", str(file))


@pytest.mark.parametrize(
    ("weights", "backbone", "reason"),
    [
        ("imagenet", "small", "Unknown model small"),
        ("imagenet-v2", "resnet18", "no 'IMAGENET1K_V2' in torchvision"),
        ("imagenet-v2", "swin_t", "no 'IMAGENET1K_V2' in torchvision"),
        ("imagenet-v2", "resnet50", "unreachable"),
    ],
)
def test_trunk_weights_that_are_not_to_be_had(monkeypatch, weights, backbone, reason):
    def unreachable(url, **_):
        raise OSError("unreachable")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    message = f"--weights {weights}: not to be had for {backbone} .{reason}"
    with pytest.raises(InputError, match=message):
        common.load_trunk(None, backbone, weights)


def test_imagenets_two_kinds_of_weights(monkeypatch):
    urls = []

    def fetch(url, **_):
        urls.append(url)
        return torchvision.models.mobilenet_v2().state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    model, kinds = (
        common.DeepLabV3("mobilenet_v2", 16, [1]),
        torchvision.models.MobileNet_V2_Weights,
    )
    for weights in ("imagenet", "imagenet-v2"):
        text = common.load_trunk(model, "mobilenet_v2", weights)
        assert text.endswith(f"from {weights}; random stay: none")
    assert urls == [kinds.IMAGENET1K_V1.url, kinds.IMAGENET1K_V2.url]


# metric


def test_confusion_and_iou_equal_the_published_ones(golden):
    for case in golden["metrics"]:
        rng = np.random.default_rng(case["seed"])
        truth = rng.choice(np.array([*case["present"], 255]), size=(3, 10, 12))
        predicted = rng.integers(0, 7, size=(3, 10, 12))
        keep = rng.random((3, 10, 12)) < 0.6
        predicted = np.where(keep & (truth != 255), truth, predicted)
        confusion = common.confusion_matrix(torch.tensor(truth), torch.tensor(predicted), 7)
        assert confusion.tolist() == case["confusion"]
        # the published programs add 1e-6 to the union; without that they agree to the last digit
        union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = common.iou_per_class(confusion) / 100
        published = case["mib"]["class_iou"]
        for value, n, expected in zip(iou.tolist(), union.tolist(), published, strict=True):
            if expected is None:
                assert np.isnan(value)
            else:
                assert value * n / (n + 1e-6) == pytest.approx(expected, rel=1e-9)
        assert iou.nanmean().item() == pytest.approx(case["mib"]["mean_iou"], rel=1e-6)
        # SSUL and DKD count an absent class as 0
        assert iou.nan_to_num(0).mean().item() == pytest.approx(case["ssul"]["mean_iou"], rel=1e-6)
        theirs, ours = case["dkd"], common.averages(100 * iou.nan_to_num(0), 3, background=True)
        names = {"base": "old", "new": "new", "harmonic": "harmonic", "all": "overall"}
        for key, name in names.items():
            assert ours[key] == pytest.approx(theirs[name], rel=1e-6)
        pixels, classes = common.accuracies(confusion)
        assert pixels == pytest.approx(100 * case["mib"]["overall_acc"], rel=1e-9)
        assert classes == pytest.approx(100 * case["mib"]["mean_acc"], rel=1e-6)


def test_iou_of_a_hand_counted_matrix():
    iou = common.iou_per_class(torch.tensor([[2, 1, 0], [1, 3, 0], [0, 0, 0]]))
    assert iou[:2].tolist() == pytest.approx([50, 60]) and np.isnan(iou[2])


def test_averages_equal_dkds(golden):
    expected = golden["dkd"]["metric_seed0"]["results"]
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 7, size=(2, 9, 11)), rng.integers(0, 7, size=(2, 9, 11))
    truth[rng.random((2, 9, 11)) < 0.15] = 255
    keep = (rng.random((2, 9, 11)) < 0.6) & (truth != 255)
    predicted[keep] = truth[keep]
    confusion = common.confusion_matrix(torch.tensor(truth), torch.tensor(predicted), 7)
    iou = common.iou_per_class(confusion)
    ours = common.averages(iou, 3, background=True)
    assert iou.tolist() == pytest.approx(expected["by_class"], rel=1e-6)
    for key, theirs in (
        ("base", "miou_old"),
        ("new", "miou_new"),
        ("harmonic", "hiou"),
        ("all", "miou_all"),
    ):
        assert ours[key] == pytest.approx(expected[theirs], rel=1e-6)
    assert common.averages(iou, 3, background=False)["base"] == pytest.approx(
        np.mean(expected["by_class"][1:4])
    )
    # theirs subtracts the 1e-6; undone, the values are the same to 1e-9
    union = (confusion.sum(0) + confusion.sum(1) - confusion.diag()).numpy()
    assert (iou.numpy() * union / (union - 1e-6)).tolist() == pytest.approx(
        expected["by_class"], rel=1e-9
    )


def test_an_absent_class_is_left_out_not_counted_as_zero(golden):
    """DKD's program counts it as 0: 66.67 where two of three new classes are perfect."""
    truth = torch.tensor(np.random.default_rng(0).integers(0, 6, size=(2, 9, 11)))
    iou = common.iou_per_class(common.confusion_matrix(truth, truth, 7))
    assert np.isnan(iou[6]) and common.averages(iou, 3, True)["new"] == 100
    theirs = golden["dkd"]["metric_absent_class"]["results"]["miou_new"]
    assert iou.nan_to_num(0)[4:].mean().item() == pytest.approx(theirs, rel=1e-6)


def test_the_evaluation_counts_every_test_pixel_once(few_shapes):
    """Whatever the batch; the model sees the test views, the labels are those of its step."""
    args = trees.arguments("dkd", "--dataset shapes --task 15-5 --crop 32 --batch 6")
    data = common.Data(args)
    step, found = data.steps[0], []
    model = common.build_model(args, [15]).eval()
    view, images = data.testing(step)
    for args.batch in (6, len(images)):
        found.append(common.evaluate(model, common.most_likely, data, step))
    assert found[0] == found[1]
    confusion, result = torch.tensor(found[0]["confusion"]), found[0]
    labels = torch.stack([view[0, i][1] for i in images]).long()
    assert confusion.sum(1).tolist() == labels.flatten().bincount(minlength=256)[:16].tolist()
    assert [*result["iou"]] == data.names[:16] and result["test_images"] == len(images) < 20
    assert result["training_images"] == len(data.images[0])
    wrong = common.evaluate(model, lambda z: 0 * z[:, 0].long(), data, step)
    assert wrong["pixel_accuracy"] == pytest.approx(100 * (labels == 0).sum() / (labels < 16).sum())
    assert wrong["with_background"]["new"] is None  # there is none yet


def test_published_rows_have_a_source_and_numbers():
    rows = files.read_table("published")
    assert len(rows) > 300
    for row in rows:
        assert row["source"] and row["dataset"] in ("voc", "ade") and row["method"]
        for key in ("old", "new", "harmonic", "all", "average"):
            assert row[key] == "" or 0 <= float(row[key]) <= 100
        if row["convention"] in ("A", "B") and row["old"] and row["new"] and row["task"] == "15-1":
            weights = (15, 5) if row["convention"] == "A" else (16, 5)
            mean = np.average([float(row["old"]), float(row["new"])], weights=weights)
            agree = mean == pytest.approx(float(row["all"]), abs=1.0)
            assert agree != ("misprint" in row["source"]), row


# run


def test_a_trainable_parameter_outside_the_optimiser_is_named():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model["a"].parameters(), 0.1)
    with pytest.raises(InputError, match=r"b.weight and 1 more: in no parameter group"):
        common.refuse_parameters_outside(optimizer, model)
    model["b"].requires_grad_(False)
    common.refuse_parameters_outside(optimizer, model)


@pytest.mark.parametrize(("case", "warmup"), [("sched_poly", 0.0), ("sched_warmup_poly", 0.2)])
def test_schedule_equals_the_authors(golden, case, warmup):
    entry = golden["dkd"][case]
    for i, expected in entry["results"].items():
        rate = entry["base_lr"] * common.poly(int(i), entry["max_iters"], warmup)
        assert rate == pytest.approx(expected, rel=1e-9)


def test_one_value_for_all_steps_or_one_for_the_first():
    first, *later = common.task_steps("15-1", 20)
    assert common.per_step([3, 4], first) == 3 and common.per_step([5], first) == 5
    assert [common.per_step([3, 4], step) for step in later] == [4] * 5


# flags


def test_what_is_not_typed_comes_from_the_recipe_of_the_data_set():
    args = trees.arguments("dkd", "--dataset ade --batch 3 --lr 1 2")
    assert (args.task, args.epochs, args.batch, args.lr) == ("100-50", [100], 3, [1, 2])
    assert (args.method, args.device, args.precision) == ("dkd", "cpu", "fp32")
    own = trees.arguments("dkd", "--dataset folder")
    assert (own.task, own.epochs, own.positive_weight) == ("15-1", [60], [2, 1])
