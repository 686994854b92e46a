"""Running statistics of the weights that are in a model now."""

import copy
import re
from pathlib import Path

import pytest
import torch
from problems import same
from torch import nn
from torch.optim.swa_utils import update_bn

from paceline import PACE, recomputed_statistics

DOCS = Path(__file__).parents[2] / "docs"


class Named(nn.Module):
    """Takes its input by name, beside others."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        return self.net(x)


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6 + i, 4, 5, generator=generator) for i in range(count)]


def network():
    torch.manual_seed(0)
    shared = nn.BatchNorm1d(3, momentum=0.2)
    layers = [
        nn.Conv1d(4, 3, 2),
        shared,
        shared,
        nn.Dropout(0.5),
        nn.Conv1d(3, 3, 2),
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(9, 1),
        nn.BatchNorm1d(1, momentum=None),
    ]
    model = nn.Sequential(*layers)
    for x in batches(2, seed=1):
        model(x)
    return model


def everything(model):
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    modes = {name: x.training for name, x in model.named_modules()}
    momenta = {name: getattr(x, "momentum", None) for name, x in model.named_modules()}
    return {"buffers": buffers, "modes": modes, "momenta": momenta, "rng": torch.get_rng_state()}


LOADERS = {
    "tensors": (lambda model: model, lambda x: x),
    "tuples": (lambda model: model, lambda x: (x, torch.zeros(len(x)))),
    "lists": (lambda model: model, lambda x: [x, 1]),
    "dicts": (Named, lambda x: {"x": x, "labels": None}),
    "tuples of dicts": (Named, lambda x: ({"x": x}, 1)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", LOADERS)
def test_the_statistics_are_the_means_over_the_batches_and_the_live_ones_come_back(form, training):
    model = network()
    wrapped = LOADERS[form][0](model).train(training)
    expected = copy.deepcopy(model)
    expected[3].p = model[3].p = 0.0  # what it drops moves the later statistics
    update_bn(batches(), expected)
    first = copy.deepcopy(expected[:5]).train()
    normalised = [first(x) for x in batches()]  # of InstanceNorm, which update_bn leaves out
    mean = torch.stack([y.mean((0, 2)) for y in normalised]).mean(0)
    variance = torch.stack([y.var(2).mean(0) for y in normalised]).mean(0)
    before = everything(wrapped)
    with recomputed_statistics(wrapped, map(LOADERS[form][1], batches())):
        inside = everything(wrapped)
        for index in (1, 8):
            assert same(inside["modes"], before["modes"])
            torch.testing.assert_close(model[index].running_mean, expected[index].running_mean)
            torch.testing.assert_close(model[index].running_var, expected[index].running_var)
            assert model[index].num_batches_tracked == (6 if index == 1 else 3)
        torch.testing.assert_close(model[5].running_mean, mean)
        torch.testing.assert_close(model[5].running_var, variance)
        assert inside["momenta"] == before["momenta"]
        wrapped.eval()(batches()[0])
    assert same(everything(wrapped), before)


def test_random_numbers_are_drawn_as_if_there_were_no_pass():
    model, before = network(), torch.get_rng_state()
    with recomputed_statistics(model, torch.utils.data.DataLoader(batches()[0], 2, shuffle=True)):
        assert same(torch.get_rng_state(), before)


def failing():
    yield batches()[0]
    raise ZeroDivisionError


@pytest.mark.parametrize("where", ["in the context", "in the batches", "in the model"])
def test_after_an_exception_everything_is_back(where):
    model = network()
    before = everything(model)
    given = {"in the batches": failing(), "in the model": [torch.zeros(2, 2)]}.get(where, batches())
    with (
        pytest.raises((ZeroDivisionError, RuntimeError)),
        recomputed_statistics(model, given),
    ):
        raise ZeroDivisionError
    assert same(everything(model) | {"rng": 0}, before | {"rng": 0})


def test_no_batch_is_refused():
    model = network()
    before = everything(model)
    used_up = iter(batches())
    list(used_up)
    for given in ([], used_up):
        with (
            pytest.raises(ValueError, match="batches has no batch to compute running statistics"),
            recomputed_statistics(model, given),
        ):
            pass
        assert same(everything(model), before)


def test_a_frozen_layer_keeps_its_statistics():
    model = network()
    model[1].eval()
    before = everything(model)
    with recomputed_statistics(model, batches()):
        inside = everything(model)["buffers"]
        assert same(inside["1.running_mean"], before["buffers"]["1.running_mean"])
        assert not same(inside["8.running_mean"], before["buffers"]["8.running_mean"])
    assert same(everything(model), before)


class Routed(nn.Module):
    """Of two layers one is reached."""

    def __init__(self):
        super().__init__()
        self.near, self.far = nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)

    def forward(self, x):
        return self.near(x)


def test_a_layer_that_no_batch_reaches_keeps_its_statistics_and_is_named():
    model = Routed()
    model.far.running_mean.fill_(7.0)
    model.near.running_mean.fill_(7.0)
    held = recomputed_statistics(model, batches())
    with pytest.warns(UserWarning, match="no batch reached 'far', which keep the run") as warned:
        held.__enter__()
    assert (model.far.running_mean == 7).all()
    assert (model.near.running_mean.abs() < 1).all()
    assert warned[0].filename == __file__


def test_a_model_without_such_layers_reads_no_batch():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with recomputed_statistics(model, failing()):
        pass


def test_the_lines_of_the_documentation_save_the_average_with_its_own_statistics(tmp_path):
    page = (DOCS / "averages.md").read_text()
    (lines,) = re.findall(r"```python\n((?:(?!```).)*recomputed_statistics.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True).sin()
    opt = PACE(model.parameters(), lr=5e-2, pullback=0.0, averaging="uniform:start=50")
    for step in range(150):
        i = torch.arange(64) + 64 * (step % 4)
        opt.zero_grad()
        (model(x[i]) - y[i]).square().mean().backward()
        opt.step()
    loader = list(zip(x.split(64), y.split(64), strict=True))
    losses = []

    @torch.no_grad()
    def evaluate(model):
        losses.append((model.eval()(x) - y).square().mean().item())
        model.train()

    evaluate(model)
    with opt.averaged():
        evaluate(model)  # with the live statistics
    path = tmp_path / "model.pt"
    names = {"opt": opt, "model": model, "loader": loader, "evaluate": evaluate, "path": path}
    exec(lines, names)
    evaluate(model)
    live, stale, fresh, after = losses
    assert fresh < stale - 0.01
    assert after == live
    model.load_state_dict(torch.load(path))
    evaluate(model)
    assert losses[-1] == fresh
