"""data/tables.py: what a run shows of itself as text."""

import csv

from common import Step
from data import tables


def test_the_live_line_keeps_all_losses_within_80_columns():
    """DKD's names are the longest of the five methods."""
    values = ("0.012345", "1.2e-05", "48.479", "1234.5", "0.5")
    losses = dict(zip(("mbce", "ac", "kd", "positive", "negative"), values, strict=True))
    line = tables.live_line(0.374, 3725, losses)
    expected = "37 %, 1:02:05 left; mbce 0.012 ac 0.000 kd 48.47 positive 1234. negative 0.500"
    assert line == expected and len(tables.live_line(1, 0, losses)) < 80


def test_new_classes_that_are_not_learned_are_named():
    result = {"iou": {"background": 0.0, "old": 0.2, "new": 0.9, "unseen": None, "found": 1.0}}
    line = tables.not_learned(result, ["new", "unseen", "found"], 90)
    assert line.startswith("\n  not learned in 90 iterations: new. Try more --epochs, ")
    assert tables.not_learned(result, ["unseen", "found"], 90) == ""


def test_a_class_has_its_place_in_the_table_and_its_row_in_the_csv_file():
    first = {"background": 90.0, "a, b": 12.345, "c" * 40: None}
    results = [{"step": 0, "iou": first}, {"step": 1, "iou": first | {"new": 0.0}}]
    lines = tables.iou_table(results[1]).splitlines()
    assert max(map(len, lines)) <= 79 and lines[0].split()[:2] == ["background", "90.0"]
    assert lines[0].endswith(f"{'c' * 18}     -") and lines[1].split() == ["new", "0.0"]
    rows = list(csv.reader(tables.iou_csv(results, [Step(0, 1, 2), Step(1, 3, 3)]).splitlines()))
    assert rows[0] == ["class", "learned_in", "step_0", "step_1"]
    assert rows[2] == ["a, b", "0", "12.35", "12.35"] and rows[4] == ["new", "1", "", "0.00"]
    assert rows[3][2:] == ["", ""]
    assert tables.iou_csv([], []) == "class,learned_in\n"  # the only checkpoint was damaged


def test_a_row_that_fits_both_averages_counts_as_the_rest_of_its_table():
    """PLOP's Table 1 has ILT's numbers with the background; MiB's has others, without it."""
    place = "voc", "15-1", "overlapped", "ILT"
    best = tables.best_published(*place, "with background")
    assert (best["old"], best["all"], best["source"]) == ("8.75", "8.56", "PLOP Table 1")
    assert tables.averaging_convention(best) == "with background"
    assert tables.best_published(*place, "no background")["source"] == "MiB Table 1"
