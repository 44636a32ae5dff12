"""README.md, data/README.md, data/RESULTS.md and --help: what they say works as it stands."""

import csv
import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import trees
from torch.distributed.run import get_args_parser
from trees import METHODS, SMALL

import common
import mib_unbiased
from data import files, predict, tables

slow = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    name: (ROOT / name).read_text() for name in ("README.md", "data/README.md", "data/RESULTS.md")
}
README = PAGES["README.md"]
MODULES = {"data.prepare": ["voc"], "data.predict": ["run"], "data.compare": ["run"]}  # least words
OTHERS = ("venv", "pytest", "tests/benchmark.py", "tests/kill.py", "mine.py")  # no flags of ours


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text):
    """The commands in a page's blocks of shell: a list of words each, comments left out."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            line = re.sub(r"^for seed in .*; do (.*)\$seed; done", r"\g<1>1", line)
            found.append([])
            for word in shlex.split(line, comments=True):
                found.append([]) if word == "&&" else found[-1].append(word)
    return [words for words in found if words]


def python(words):
    """What `python` runs, "data.prepare" or "dkd.py", and its words. None: another command."""
    if not re.fullmatch(r"(.*/)?python3?", words[0]):
        return None
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def parser(name):
    return importlib.import_module(name.removesuffix(".py")).flags()


# commands


@pytest.fixture
def shell(monkeypatch, tmp_path, capsys, few_shapes):
    """Runs a command in this process, in a folder with the scripts; gives what it prints.

    small       flags that a method gets besides: a small network, a short run
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "HERE", tmp_path)  # where the scripts of runs are looked for
    for method in METHODS:
        shutil.copy(ROOT / f"{method}.py", tmp_path)

    def run(words, small=f"{SMALL} --epochs 1"):
        called = python(words)
        if called is None:
            assert words[0] == "cp", words
            return shutil.copy(*words[1:])
        name, given = called
        if "runs/*" in given:  # as a shell does
            at = given.index("runs/*")
            given[at : at + 1] = map(str, sorted(Path("runs").iterdir()))
        if name in MODULES:
            status = importlib.import_module(name).main(given)
        else:
            given += shlex.split(small) * ("--analyse" not in given)
            status = trees.launch(Path(name).resolve(), shlex.join(given))
        out, err = capsys.readouterr()
        left_out = "--analyse" in given  # names the runs of one step, which it cannot analyse
        assert status == 0 and (left_out or err == ""), (words, err)
        return out

    return run


@slow
def test_the_commands_of_the_first_sections_run(shell, tmp_path, monkeypatch):
    """In their order, on tiny data, the methods with a small network; nothing is fetched."""
    pytest.importorskip("matplotlib")
    trees.voc(tmp_path / "voc", trees.CLASSES, trees.CLASSES[:12])
    trees.ade(tmp_path / "ade", [range(1, 151)], [range(1, 151)])
    trees.msrc(tmp_path / "msrc")
    trees.write(tmp_path / "photo.jpg", trees.picture(1))
    monkeypatch.setattr(files, "fetch", None)  # all is there
    ran = []
    for words in commands(section("Start")) + commands(section("More commands")):
        called = python(words)
        if called and called[0] not in OTHERS:
            ran.append(called[0])
            where = "ade" if "ade" in words else "msrc" if "msrc" in words else "voc"
            shell([str(tmp_path / where) if word == "DIR" else word for word in words])
    assert {*ran} >= {"dkd.py", "ilt.py", "ucd.py", "mib_unbiased.py", *MODULES} and len(ran) > 12
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "runs/dkd-shapes-15-1-overlapped-s0/pictures/photo_overlay.png").exists()


@slow
def test_your_own_data_work_and_a_run_leaves_what_is_listed(shell, tmp_path):
    train, test = [[1], [2], [3], [1, 3], [2, 3]], [[1, 2], [3]]
    pets = trees.own(tmp_path / "pets", train, test, ["cat", "dog", "horse"])
    text = section("Your own data")
    for line in re.findall(r"^pets/(\S+)", text, re.M):
        assert (pets / re.sub(r"/a\b", "/train0", line)).exists(), line
    trees.write(tmp_path / "photo.jpg", trees.picture(1))
    trees.write(tmp_path / "photos/other.png", trees.picture(2))
    for words in commands(text):
        out = shell(words)
    assert "photo.jpg: " in out and "other.png: " in out
    folder = Path("runs/dkd-folder-2-1-overlapped-s0")
    assert (folder / "pictures/photos-other_overlay.png").exists()
    listed = re.findall(r"^- .*", section("What a run leaves"), re.M)
    for name in re.findall(r"`([^`]+)`", "\n".join(listed).replace("step_K", "step_0")):
        assert " " in name or (folder / name).exists() or name == "last.pt", name


@slow
def test_the_fork_applies_as_written_and_runs(shell, tmp_path):
    text = section("Fork a method")
    copy, *calls = commands(text)
    assert copy == ["cp", "dkd.py", "mine.py"]
    shell(copy)
    fork, diff = tmp_path / "mine.py", re.search("```diff\n(.*?)```", text, re.S)[1]
    fork.write_text(trees.patched(fork.read_text(), diff))
    epochs = "--epochs 1 2"  # after one update of the network it has turned
    shell(shlex.split("python dkd.py --task 15-1 --dataset shapes"), epochs)
    for words in calls:
        out = shell(words, epochs)
    assert (
        "| DKD | " in out and "`mine.py --cosine 1`" in out and (tmp_path / "curves.png").exists()
    )
    for kind in ("", "-dry"):
        table = Path(f"runs/mine-shapes-15-1-overlapped-s0{kind}/train.csv").read_text()
        for row in csv.DictReader(table.splitlines()):
            assert row["cosine"] == "" if row["step"] == "0" else float(row["cosine"]) > 1e-6


@slow
def test_the_loop_that_is_shown_is_mibs(start, data, monkeypatch):
    """It gives the same bits as mib_unbiased.py."""
    flags, folder = f"{trees.TINY} --epochs 1", trees.folder_name("mib_unbiased")
    assert start(flags, method="mib_unbiased")[0] == 0
    args = trees.arguments("mib_unbiased", f"{flags} --data {data} --out other")
    args.kd_weight = mib_unbiased.distillation_weight(args)
    monkeypatch.setattr(sys, "argv", [mib_unbiased.__file__])
    names = vars(mib_unbiased) | {"args": args, "predict": common.most_likely}
    exec(re.search("```python\n(.*?)```", section("Fork a method"), re.S)[1], names)
    trees.assert_same_run(folder, Path("other") / folder.name)


def test_torchrun_gets_flags_that_it_and_the_script_know():
    calls = commands(section("Several GPUs"))
    assert calls and all(words[0] == "torchrun" for words in calls)
    for words in calls:
        given = get_args_parser().parse_args(words[1:])
        parser(given.training_script).parse_args(given.training_script_args)


@pytest.mark.parametrize("name", MODULES)
def test_python_runs_the_modules_of_data(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)  # runpy warns of it
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out.startswith(f"usage: python -m {name} ")


# flags


def spans(text):
    """(script or None, words) of each piece of a page that is in backticks and runs, or is a flag.

    A flag is one of the script that is named before it in its paragraph, item or table row; else
    of the script in the heading.
    """
    text, heading = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), None
    for part in re.split(r"\n\n|\n(?=#|- |\| )", text):
        if re.match("##? ", part):
            heading = re.search(r"\w+\.py|$", part)[0]
        named = heading
        for span in re.findall(r"`([^`]+)`", part.replace("\n", " ")):
            span = re.sub(r"--seed S|--setting S|@\S+|\.\.\.", "", span)
            called = python(shlex.split(span)) if span.startswith("python ") else None
            if called and called[0] not in OTHERS:
                named = called[0]
                yield called
            elif re.fullmatch(r"\w+\.py", span) and span.removesuffix(".py") in METHODS:
                named = span
            elif span.startswith("--"):
                yield named, shlex.split(span)


def accepts(name, words):
    """A lone flag has to exist; anything else is parsed as it stands."""
    made, words = parser(name), [word for word in words if word != "--help"]
    if len(words) == 1 and words[0].startswith("--"):
        return words[0] in made._option_string_actions
    if not words or words[0].startswith("--"):
        words = MODULES.get(name, []) + words
    try:
        return bool(made.parse_args(words))
    except SystemExit:
        return False


def test_the_flags_on_the_pages_are_accepted():
    found = [pair for page in PAGES.values() for pair in spans(page)]
    for words in (words for page in PAGES.values() for words in commands(page)):
        called = python(words)
        if called and called[0] not in OTHERS:
            found.append(called)
    assert len(found) > 100
    for name, words in found:
        names = [name] if name else [f"{method}.py" for method in METHODS] + [*MODULES]
        assert any(accepts(name, words) for name in names), (name, words)


@slow
def test_the_line_of_progress_tells_step_and_what_is_left(start, tmp_path):
    pets = trees.own(tmp_path / "pets", [[1], [2], [3], [1, 3], [2, 3]], [[1]], ["a", "b", "c"])
    flags = f"--dataset folder --task 2-1 {SMALL} --epochs 3 --batch 2"
    lines = [line for line in start(flags, pets)[1].splitlines() if "iteration" in line]
    pattern = r"  step {}, iteration {}/{}, 0:00:0\d left{}, \d+ images/s; mbce .*"
    assert re.fullmatch(pattern.format(0, 6, 6, r" \(run: 0:\d\d:\d\d or more\)"), lines[0])
    assert re.fullmatch(pattern.format(1, 3, 3, ""), lines[1]) and len(lines) == 2
    assert tables.clock(3725.4) == "1:02:05"


@pytest.mark.parametrize("method", METHODS)
def test_help_fits_a_screen_per_group(method, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made = parser(method)
    text = made.format_help()
    groups = re.split(r"\n\n(?=[a-z].*:\n)", text)[2:]
    titles = ["task", "schedule", "model", "system", "output", "method"]
    assert [re.match(r"\w+", group)[0] for group in groups[:6]] == titles
    assert max(len(group.splitlines()) for group in groups) <= 40
    assert len(made._actions) - 1 < 40  # without --help


@pytest.mark.parametrize("name", [*METHODS, *MODULES])
def test_help_says_every_default_and_fits_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    made = parser(name)
    assert [line for line in made.format_help().splitlines() if len(line) > 80] == []
    for action in made._actions[1:]:  # in brackets: the default; a flag without a value is off
        assert re.search(r"\(.+\)", action.help) or action.default in (None, False), action.help


# pages


def test_the_readme_has_at_most_300_lines():
    assert len(README.splitlines()) <= 300


def test_the_citation_has_the_projects_title():
    title = re.search('^title: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert README.startswith(f"# {title}\n")


def test_every_promise_is_checked_by_something_that_exists():
    rows = [row for row in section("Promises").splitlines() if row.startswith("| ")][2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) > 8
    for row in rows:
        names = re.findall("`([^`]+)`", row.split("|")[2])
        assert names, f"nothing checks it: {row}"
        for name in names:
            name = python(name.split())[0] if name.startswith("python ") else name
            if name.startswith("test_"):
                assert f"def {name}(" in tests, name
            else:
                assert name in MODULES or (ROOT / name).is_file(), name


def test_links_lead_somewhere():
    """Files of the project, and headings in them."""

    def anchor(heading):
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    for name, text in PAGES.items():
        links = re.findall(r"\]\(([^)\s]+)\)|^\[\d+\]: (\S+)|src=\"([^\"]+)\"", text, re.M)
        for link in ("".join(found) for found in links):
            if link.startswith("http"):
                continue
            file, _, place = link.partition("#")
            target = (ROOT / name).parent / file if file else ROOT / name
            assert target.exists(), (name, link)
            headings = re.findall("^#+ (.*)", target.read_text(), re.M) if place else ()
            assert not place or place in map(anchor, headings), (name, link)


def test_trees_of_folders_lie_in_fenced_blocks():
    for name, text in PAGES.items():
        outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        assert not re.findall(r"^\s*(?:DIR|pets)/.*", outside, re.M), name
    page = PAGES["data/README.md"]
    for dataset in common.FOLDERS:  # each says where it goes, on a terminal without the fences
        part = page.split(f"--dataset {dataset}`\n")[1].split("\n## ")[0]
        assert re.search(r"^```text\nDIR/", part, re.M), dataset
        shown = common.how_to_get(dataset)
        assert re.search(r"^DIR/", shown, re.M) and "```" not in shown, dataset
