"""Options in every form in which trainers and configuration libraries give them."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from problems import gradients, same, walk
from torch.nn import Parameter

from paceline import EMA, PACE, PowerEMA, Pullback


class Listed(Sequence):
    """As the lists of configuration libraries are: a sequence, and neither list nor tuple."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


class Mapped(Mapping):
    def __init__(self, **values):
        self.values_of = values

    def __getitem__(self, key):
        return self.values_of[key]

    def __iter__(self):
        return iter(self.values_of)

    def __len__(self):
        return len(self.values_of)


def ends(**options):
    torch.manual_seed(0)
    p = Parameter(torch.randn(5, 4))
    opt = PACE([p], **{"lr": 0.05, "pullback": 2.0, **options})
    walk(opt, [p], 0, 4)
    return p.detach(), dict(opt.state[p])


SAME = [
    ({"betas": (0.8, 0.95)}, {"betas": Listed(0.8, 0.95)}),
    ({"betas": (0.8, 0.95)}, {"betas": [0.8, 0.95]}),
    (
        {"betas": (0.8, 0.95)},
        {"betas": tuple(torch.tensor(b, dtype=torch.float64) for b in (0.8, 0.95))},
    ),
    ({"lr": 0.05}, {"lr": torch.tensor([0.05], dtype=torch.float64)}),
    ({"lr": 0.05}, {"lr": torch.tensor(0.05, dtype=torch.float64), "capturable": False}),
    ({"kappa": 0.3}, {"averaging": PowerEMA(0.3)}),
    ({"kappa": 0.3}, {"averaging": "ema:kappa=0.3"}),
    ({"return_kappa": 0.7}, {"returns": PowerEMA(0.7)}),
    ({"returns": {"a": "uniform", "b": EMA(0.1)}}, {"returns": Mapped(a="uniform", b=EMA(0.1))}),
    ({"fused": False}, {"fused": False, "foreach": True}),
    ({"fused": False}, {"fused": False, "foreach": False}),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=map(str, range(len(SAME))))
def test_two_ways_to_say_one_thing(one, other):
    assert same(ends(**one), ends(**other))


def test_fused_with_foreach_false_is_fused(kernel):
    """As some trainers pass to every optimizer."""
    assert same(ends(fused=True, foreach=False), ends(fused=True))
    group = PACE([Parameter(torch.ones(1))], pullback=0, fused=True, foreach=False).param_groups[0]
    assert group["fused"] is True
    assert "foreach" not in group
    opt = PACE([{"params": [Parameter(torch.ones(1))], "foreach": False}], pullback=0)
    assert "foreach" not in opt.param_groups[0]


def test_betas_as_tensors_are_read_at_each_step():
    moved, fixed = (torch.tensor(0.9, dtype=torch.float64) for _ in range(2))
    runs = []
    for beta in (moved, fixed):
        p = Parameter(torch.ones(3))
        opt = PACE([p], lr=0.1, betas=(beta, 0.99), pullback=0.1)
        for t in range(2):
            p.grad = gradients(p, t)
            opt.step()
            moved.fill_(0.5 if beta is moved else 0.9)
        runs.append(opt.state[p]["exp_avg"].clone())
    assert not torch.equal(*runs)
    with pytest.raises(ValueError, match="capturable=True needs betas that are numbers"):
        PACE([p], betas=(moved, 0.99), pullback=0.1, capturable=True)


@pytest.mark.parametrize("kind", ["PACE", "Pullback"])
def test_a_group_says_kappa_its_own_way(kind):
    groups = [
        {"params": [Parameter(torch.ones(2))], "kappa": 0.2},
        {"params": [Parameter(torch.ones(2))]},
    ]
    if kind == "PACE":
        opt = PACE(groups, pullback=0.0, kappa=0.4)
    else:
        opt = Pullback(torch.optim.SGD(groups, lr=0.1), kappa=0.4)
    assert [g["averaging"] for g in opt.param_groups] == ["ema:kappa=0.2", "ema:kappa=0.4"]
    assert all("kappa" not in group for group in opt.param_groups)
    twice = {"params": [Parameter(torch.ones(2))], "kappa": 0.2, "averaging": "uniform"}
    with pytest.raises(ValueError, match="averaging must be left out with kappa, got 'uniform'"):
        opt.add_param_group(twice)
    assert len(opt.param_groups) == 2


def test_a_bases_own_kappa_stays_its_own():
    class WithKappa(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            for group in self.param_groups:
                group["kappa"] = 1000.0
            self.defaults["kappa"] = 1000.0

    p = Parameter(torch.ones(3))
    opt = Pullback(WithKappa([p]), kappa=0.3)
    walk(opt, [p], 0, 2)
    group = opt.param_groups[0]
    assert (group["kappa"], group["averaging"]) == (1000.0, "ema:kappa=0.3")


@pytest.mark.parametrize(
    "make",
    [
        lambda p, c, clip: PACE([p], gain="scalar", pullback=c, clip=clip),
        lambda p, c, clip: PACE([{"params": [p], "gain": "scalar", "pullback": c, "clip": clip}]),
        lambda p, c, clip: Pullback(
            torch.optim.SGD([p], lr=0.1), gain="scalar", pullback=c, gain_clip=clip
        ),
    ],
    ids=["PACE", "a group", "Pullback"],
)
def test_a_scalar_gain_that_is_clipped_is_at_most_1(make):
    with pytest.raises(
        ValueError, match=r"^pullback must be in \[0, 1\] with gain='scalar', got 2"
    ):
        make(Parameter(torch.ones(2)), 2.0, True)
    for c, clip in ((1.0, True), (2.0, False)):
        assert make(Parameter(torch.ones(2)), c, clip).param_groups[0]["pullback"] == c


@pytest.mark.parametrize("make", [PACE, lambda groups: Pullback(torch.optim.SGD(groups))])
def test_a_misspelt_option_of_a_group_is_refused_and_other_keys_are_kept(make):
    first, second = ({"params": [Parameter(torch.ones(2))]} for _ in range(2))
    with pytest.raises(ValueError, match=r"has 'pulback'; did you mean 'pullback'\?"):
        make([first, second | {"pulback": 0.0}])
    opt = make([dict(first), second | {"name": "head", "lr_scale": 0.5, "weight_decay_mult": 0.1}])
    assert opt.param_groups[1]["lr_scale"] == 0.5
    with pytest.raises(ValueError, match=r"has 'kapa'; did you mean 'kappa'\?"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "kapa": 0.1})
    assert len(opt.param_groups) == 2
