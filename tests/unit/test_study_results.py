"""Results of studies: statistics, tables and plots, by outcomes that are known."""

import json
import math
from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_cca.lab.studies.plots import plot
from megatron_cca.lab.studies.results import Statistic, as_json, over_seeds, table
from tests.references.small_study import BETA, LAMBDA, LR, graded, logged, numbers, results_of, settled


def test_means_and_spreads_by_hand():
    found = over_seeds([{"fid": 10.0}, {"fid": 12.0}, {"fid": 17.0}])
    assert found["fid"] == Statistic(13.0, math.sqrt((9 + 1 + 16) / 2))
    assert over_seeds([{"fid": 10.0}])["fid"] == Statistic(10.0, None)
    assert over_seeds([]) == {}


def test_a_method_is_compared_with_the_others(tmp_path):
    def outcome(task):
        run = task.after.config.objective
        if run.name == "cca":
            return numbers(9.0 + task.seed, score=8.5, accuracy=0.9)
        return numbers(11.0 + task.seed + task.sampling.guidance_scale * 10, score=8.0 + task.seed / 2)

    text = table(results_of(settled(tmp_path, outcome, logged, compare="cca")))
    lines = text[text.index("## CCA against the others") :].splitlines()
    # Seeds 1, 2, 3: the FIDs differ by 2 with a spread of 1 each, which is no more than both together.
    row = "+0.150 better | -0.50 undecided | {} | +0.000 undecided | +0.000 undecided |"
    assert "| CCA against | accuracy | IS | FID | precision | recall |" in lines
    assert "| base, guidance-free | " + row.format("-2.00 undecided") in lines
    assert "| base + CFG | " + row.format("-7.00 better") in lines


def test_the_table_by_hand(tmp_path):
    text = table(results_of(settled(tmp_path, graded, logged)))
    lines = text.splitlines()
    assert lines[0] == "# A small study"
    rest = "9.00 (0.50) | {} | 0.500 (0.000) | 0.250 (0.000) | {} | {} |"
    wanted = [
        "| base, guidance-free |  | 1 | 0.00 | 0.750 (0.000) | " + rest.format("12.00 (2.00)", "", "0"),
        "| base + CFG | s 0.5 | 2 | 0.00 | 0.750 (0.000) | " + rest.format("12.50 (2.00)", "", "0"),
        "| control | lr 0.001 | 1 | 1.00 | 0.750 (0.000) | " + rest.format("12.00 (2.00)", "", "0"),
        "| CCA | lr 0.001 | 1 | 1.00 | 0.750 (0.000) | " + rest.format("8.00 (2.00)", "-1.50 (0.00)", "0"),
        "| CCA | lr 0.001, β 0.3, λ 1000 | 1 | 1.00 | 0.750 (0.000) | "
        + rest.format("120.00 (20.00)", "-1.50 (0.00)", "3 collapsed"),
    ]
    for line in wanted:
        assert line in lines
    assert "| base + CFG | s 0.5 | 0.750 | 11.50 | 22.50 | 0.500 | 0.250 |  | chosen |" in lines
    assert "control: 8 steps x 8 samples x 3 passes; CCA: 3 steps x 8 samples x 8 passes." in text


def test_results_are_plain_data(tmp_path):
    plain = json.loads(json.dumps(as_json(results_of(settled(tmp_path, graded, logged)))))
    cca = next(row for row in plain["rows"] if row["method"] == "cca")
    assert (cca["mean"]["fid"], cca["std"]["fid"], cca["seeds"]["3"]["fid"]) == (8.0, 2.0, 10.0)
    assert (cca["chosen"], cca["training_passes"], cca["collapsed"]) == (True, 192, [])
    assert [trial["chosen"] for trial in plain["trials"]["cca"]] == [True, False]


def test_a_collapse_is_told_by_the_base_of_the_same_seed(tmp_path):
    """Bases of 10, 12 and 14: an FID of 31 is a collapse on the first seed alone."""

    def outcome(task):
        is_cca = task.after.config.objective.name == "cca"
        return numbers(31.0 if is_cca and task.seed != 7 else 8.0 + 2 * task.seed)

    results = results_of(settled(tmp_path, outcome))
    assert results.of("cca")[0].collapsed == [1]
    assert not results.of("cca")[0].is_lost
    assert results.of("control")[0].collapsed == []
    assert results_of(settled(tmp_path, outcome, collapse=2.0)).of("cca")[0].collapsed == [1, 2, 3]


def diverging(task):
    """Runs with a lambda of 1000 end in NaN on the first seed."""
    config = task.config
    if getattr(config.objective, "negative_weight", None) == 1000 and config.training.seed == 1:
        return {"status": "failed", "reason": "diverged: NaN in a gradient", "title": "", "seconds": 1.0}
    return logged(task)


def test_a_failed_run_is_shown_and_the_rest_goes_on(tmp_path):
    results = results_of(settled(tmp_path, graded, diverging))
    cell = results.of("cca")[2]
    assert cell.row.values == {LR: 0.001, BETA: 0.1, LAMBDA: 1000.0}
    assert cell.failed == {1: "diverged: NaN in a gradient"}
    assert (sorted(cell.seeds), cell.statistics["fid"].mean, cell.is_lost) == ([2, 3], 130.0, True)
    text = table(results)
    assert "| 2 collapsed, 1 failed |" in text
    assert "- CCA (lr 0.001, β 0.1, λ 1000), seed 1: diverged: NaN in a gradient" in text


def test_a_method_whose_trials_all_fail_is_said_to(tmp_path):
    def trained(task):
        is_lost = task.config.objective.name == "cca"
        return {"status": "failed", "reason": "diverged: loss nan", "seconds": 1.0} if is_lost else logged(task)

    results = results_of(settled(tmp_path, graded, trained))
    assert results.of("cca") == []
    assert "- CCA: none of its trials finished" in table(results)
    assert "diverged: loss nan |" in table(results)
    for one in results.study.settings.plots:
        plot(tmp_path, results, one)
    for kind in ("comparison", "frontier", "against"):
        axis = LAMBDA if kind == "against" else None
        plot(tmp_path, results, replace(one, kind=kind, file=f"lost-{kind}", methods=["cca"], x=axis, y=None))
        assert (tmp_path / f"lost-{kind}.png").is_file()


def pictures(folder, results):
    folder.mkdir()
    for one in results.study.settings.plots:
        plot(folder, results, one)
    return {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())}


def guided_worse(task):
    """As ``graded``, but for what CFG and CCA reach."""
    is_other = task.sampling.guidance_scale > 0 or task.after.config.objective.name == "cca"
    return graded(task) | ({"fid": 2 * graded(task)["fid"]} if is_other else {})


def test_plots_open_and_change_with_the_data(tmp_path):
    first = pictures(tmp_path / "first", results_of(settled(tmp_path, graded, logged)))
    assert sorted(first) == ["against", "comparison", "frontier", "heatmap"]
    assert all(min(image.shape[:2]) > 300 for image in first.values())
    (tmp_path / "again").mkdir()
    queue = settled(tmp_path / "again", guided_worse, logged)
    second = pictures(tmp_path / "second", results_of(queue))
    for name, image in first.items():
        assert image.shape != second[name].shape or (image != second[name]).any(), name


def pixels(image, colour):
    """How many pixels have about a colour, as three numbers from 0 to 255."""
    return int((abs(image.astype(int) - np.array(colour)) < 6).all(-1).sum())


def test_the_heatmap_is_dark_where_fid_is_high(tmp_path):
    image = pictures(tmp_path / "plots", results_of(settled(tmp_path, graded, logged)))["heatmap"]
    assert min(pixels(image, (0, 34, 78)), pixels(image, (254, 232, 56))) > 5000


BORDER = (214, 39, 40)


def test_the_heatmap_outlines_the_collapse_region_only(tmp_path):
    lost = pictures(tmp_path / "lost", results_of(settled(tmp_path, graded, logged)))
    (tmp_path / "well").mkdir()
    queue = settled(tmp_path / "well", lambda task: numbers(10.0 + task.sampling.guidance_scale), logged)
    well = pictures(tmp_path / "plots", results_of(queue))
    assert pixels(lost["heatmap"], BORDER) > 500
    assert pixels(well["heatmap"], BORDER) == 0
