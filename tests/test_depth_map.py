"""Scores by depth and length: cells, terminal and picture."""

import io
import json

import pytest
import torch
from matplotlib.image import imread

from kvpolicy.cli.terminal import Console
from kvpolicy.plugins.task_role import Sample
from kvpolicy.report.depth_figure import depths_png
from kvpolicy.report.depth_map import depth_maps, terminal_depths
from kvpolicy.verbs.eval_task import _grid


def row(plan="full", retention=1.0, cells=((0.0, 100, 1.0), (1.0, 200, 0.25), (0.0, 200, 0.5))):
    names = ("depth", "length", "score")
    return {"plan": plan, "retention": retention, "grid": [dict(zip(names, cell, strict=True)) for cell in cells]}


def test_cells_are_means_of_their_samples():
    places = [(0.0, 50), (1.0, 50), (0.0, 50)]
    samples = [Sample((1,), ((2,),), (), {"depth": depth, "length": length}) for depth, length in places]
    assert _grid(samples, torch.tensor([0.0, 1.0, 0.5])) == {
        "grid": [
            {"depth": 0.0, "length": 50, "score": 0.75, "n": 2},
            {"depth": 1.0, "length": 50, "score": 0.0, "n": 1},
        ]
    }
    assert _grid([Sample((1,), ((2,),), (), {"depth": 0.5})], torch.tensor([0.0])) == {}


def test_a_map_has_depths_below_each_other_and_an_empty_cell_without_a_sample():
    (full, plan) = depth_maps([row(), {"plan": "uniform"}, row("plan.json", 0.25)])
    assert (full.title, plan.title) == ("full", "plan.json, 25 % kept")
    assert (full.depths, full.lengths) == ((0.0, 1.0), (100, 200))
    assert full.values.nan_to_num(-1).tolist() == [[1.0, 0.5], [-1.0, 0.25]]
    console = Console()
    console.size = (80, 25)
    with console.capture() as capture:
        console.print(terminal_depths(full))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[:4] == ["full", "depth  100   200", "  0 % 1.00  0.50", "100 %       0.25"]


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_has_a_panel_for_each_row(count):
    picture = imread(io.BytesIO(depths_png(depth_maps([row()] * count), "needle-grid", "contained_part")))
    assert picture.shape[1] > picture.shape[0] * (0.5 if count == 1 else 1)


def test_eval_draws_a_grid_and_refuses_a_task_without_one(kvpolicy, refused, tiny_checkpoint, tmp_path):
    model, out = ["--model", tiny_checkpoint, "--dtype", "float32"], tmp_path / "grid.png"
    options = [*model, "--context", 800, "--limit", 4, "--batch-size", 2, "--png", out]
    result = kvpolicy("eval", "full", *options, "--task", "needle-grid", "--json")
    assert result.code == 0, result.err
    assert [cell["length"] for cell in json.loads(result.out)["grid"]] == [200, 400, 600, 800]
    assert out.read_bytes().startswith(b"\x89PNG")
    message = "--png draws scores by depth and length, which the samples of passkey do not name"
    assert message in refused("eval", "full", *options, "--task", "passkey")
    assert "--png goes with a task" in refused("eval", "full", "--png", out)
