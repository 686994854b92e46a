"""The code in the documents runs."""

import json
import re
from pathlib import Path

import pytest
import torch

import paceline
from paceline import PACE

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page):
    """The Python code of a page, each under its heading."""
    found = {}
    for section in re.split(r"(?m)^##+ ", (DOCS / page).read_text())[1:]:
        for i, code in enumerate(re.findall(r"(?s)```python\n(.*?)```", section)):
            found[f"{section.splitlines()[0]} {i}" if i else section.splitlines()[0]] = code
    return found


HOW_TO = blocks("how-to.md")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the recipes call yours, and what they import."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    data = torch.randn(8, 16, 8)

    def loss_of(model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def evaluate(model):
        with torch.no_grad():
            return loss_of(model, data[0]).item()

    mine = {"model": model, "batches": list(data), "loss_of": loss_of, "evaluate": evaluate}
    return {"torch": torch, **{x: getattr(paceline, x) for x in paceline.__all__}, **mine}


@pytest.mark.parametrize("recipe", HOW_TO)
def test_each_recipe_of_the_how_to_runs(recipe, names):
    before = [p.clone() for p in names["model"].parameters()]
    exec(HOW_TO[recipe], names)
    assert isinstance(names["opt"], paceline.base.AveragedOptimizer)
    assert not names["opt"].swapped  # the model has its live weights at the end
    moved = not all(map(torch.equal, before, names["model"].parameters()))
    assert moved == (".step()" in HOW_TO[recipe])


def test_all_recipes_are_found():
    assert len(HOW_TO) == 13


def test_the_tutorial_runs_and_says_what_it_shows(tmp_path, monkeypatch):
    """As in a notebook, cell by cell; fewer steps, for the code is the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "steps=600" in code[0]
    names = {}
    for cell in code:
        exec(cell.replace("steps=600", "steps=60").replace("start=300", "start=30"), names)
    assert names["same"]
    assert len(names["curve"]) == 1
    assert len(names["adamw"]) == len(names["pace"]) == len(names["RATES"])
    assert names["found"].best in {"fast", "slow", "half", "average", "live"}
    assert (tmp_path / "model.pt").exists()


def test_the_table_of_scale_is_what_states_take():
    """Bytes a parameter, in all: weights and gradients have 8 of them; sizes follow from those."""
    in_bfloat16 = {"state_dtype": torch.bfloat16}
    options = {
        "PACE, one average": {"pullback": 0.1},
        "PACE, the default: two averages": {},
        "PACE, one average, bfloat16 state": {"pullback": 0.1} | in_bfloat16,
        "PACE, the default, bfloat16 state": in_bfloat16,
    }
    rows = re.findall(r"(?m)^\| (.+?) \| (\d+) \| (.+) \|$", (DOCS / "scale.md").read_text())
    said = {name.removeprefix("AdamW and an EMA; "): int(count) for name, count, _ in rows}
    assert said.keys() == {"AdamW", *options}
    for name, given in options.items():
        p = torch.nn.Parameter(torch.zeros(1000))
        opt = PACE([p], **given)
        p.grad = torch.ones(1000)
        opt.step()
        kept = sum(x.nbytes for x in opt.state[p].values() if getattr(x, "shape", ()) == p.shape)
        assert said[name] == 8 + kept / 1000
    for _, count, sizes in rows:
        parameters = (0.124, 1.7, 7)
        for size, cell in zip(parameters, sizes.split(" | "), strict=True):
            assert float(cell.removesuffix(" GB")) == pytest.approx(int(count) * size, rel=0.03)
