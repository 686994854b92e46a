"""What is not given is the same everywhere: in PACE, in recipes and in the commands."""

import inspect

import pytest
import torch

from paceline import PACE, Pullback, defaults

PULL = {"pullback": 1.0, "gain": "scalar", "kappa": 0.3, "return_kappa": 0.7}
PAPERS = {"pullback": 3.0, "gain": "adam", "kappa": 0.5, "return_kappa": None}
AUTO = {"pullback": "auto", "kappa": 0.3, "return_kappa": 0.6}
# Recipes that say what the pull is, and why.
EXCEPTIONS = {
    **dict.fromkeys(("gemma3-1b", "gpt2-124m", "qwen3-1.7b", "smollm2-1.7b"), "the paper's"),
    **{"smollm2-135m": "the paper's"},
    **dict.fromkeys(("tiny-gpt2", "tiny-sft", "tiny-torch"), "of the tiny figures"),
}


def of_group(group):
    """A group's pull, in the words of `PULL`."""
    assert group["averaging"].startswith("ema:kappa=")
    own = float(group["averaging"].removeprefix("ema:kappa="))
    returned = group["returns"] and float(group["returns"].removeprefix("returned=ema:kappa="))
    return {**{k: group[k] for k in ("pullback", "gain")}, "kappa": own, "return_kappa": returned}


def of_method(method):
    """A method's pull, likewise."""
    found = {name: method.get(name) for name in PULL}
    return found | {"gain": found["gain"] or "adam"}


def made(**said):
    [group] = PACE([torch.nn.Parameter(torch.ones(2))], **said).param_groups
    return group


@pytest.mark.filterwarnings("ignore:.*experimental")
def test_the_class():
    assert of_group(made()) == PULL
    assert of_group(made(pullback=3.0)) == PAPERS
    assert AUTO.items() <= of_group(made(pullback="auto")).items()
    assert of_group(made(gain="scalar", return_kappa=0.9)) == PULL | {"return_kappa": 0.9}
    assert of_group(made(gain="scalar", pullback=1.0)) == PULL
    one_gain = {"gain": "scalar", "pullback": 0.5}
    assert of_group(made(**one_gain)) == PAPERS | one_gain
    assert of_group(made(kappa=0.4)) == PULL | {"kappa": 0.4, "return_kappa": None}
    # What groups leave open is one for all, or the returned model would be of two averages.
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    watched = PULL | {"pullback": 0.0, "gain": "adam"}
    pulled, not_pulled = {"params": [a]}, {"params": [b], "pullback": 0.0}
    groups = PACE([dict(pulled), dict(not_pulled)]).param_groups
    assert [of_group(group) for group in groups] == [PULL, watched]
    # Of the first that pulls: in another order it is the same.
    groups = PACE([not_pulled, pulled]).param_groups
    assert [of_group(group) for group in groups] == [watched, PULL]
    # An exception: around another optimizer nothing pulls unless it is asked for.
    alone = {"pullback": 0.0, "gain": "adam", "kappa": 0.7, "return_kappa": None}
    [group] = Pullback(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])).param_groups
    assert of_group(group) == of_group(made(pullback=0.0)) == alone
    # Where it is asked for, its averages are those of PACE; in groups, of the first that pulls.
    for said in ({"pullback": 1.0, "gain": "scalar"}, {"pullback": 3.0}):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
        groups[1] |= said
        found = Pullback(torch.optim.SGD(groups)).param_groups
        expected = of_group(made(**said))
        assert of_group(found[1]) == expected
        assert of_group(found[0]) == expected | {"pullback": 0.0, "gain": "adam"}


def test_the_rate_and_the_rest():
    expected = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01}
    assert expected.items() <= made().items()
    parameters = inspect.signature(PACE).parameters
    assert {name: parameters[name].default for name in expected} == expected


def test_recipes_and_commands():
    pytest.importorskip("transformers")
    from paceline.study.options import Comparison
    from paceline.train.methods import parse_method
    from paceline.train.recipe import Recipe, read_recipe, shipped

    new = {"config": {"model_type": "gpt2"}, "tokenizer": "bpe"}
    recipe = Recipe(**new)
    assert of_method(recipe.parsed) == PULL
    for text in (
        "pullback:sgd",
        "pace:gain=scalar:pullback=1",
        "pullback:sgd:gain=scalar:pullback=1",
    ):
        assert of_method(recipe.method_of(text)) == PULL
    assert of_method(Recipe(**new, pullback=3.0).parsed) == PAPERS
    assert AUTO.items() <= of_method(Recipe(**new, pullback="auto").parsed).items()
    [own] = [m for m in Comparison(lr=(1e-3,)).compared if m.name == "pace"]
    assert of_method(own) == PULL
    for options in (recipe, Comparison()):
        assert (options.weight_decay, options.max_grad_norm) == (0.01, 1.0)
        assert options.warmup == 0.05
    assert (recipe.lr, recipe.betas) == (1e-3, (0.9, 0.999))
    # What only averages returns the same κ as a pull; and so does the schedule that a pull is.
    assert parse_method("ema", lr=1.0).kappa == PULL["return_kappa"]
    power = parse_method("ema:power", lr=1.0)
    assert (power.kappa, power.return_kappa) == (PULL["kappa"], PULL["return_kappa"])

    says = {name for name in shipped() if {"pullback", "kappa"} & read_recipe(name).keys()}
    assert says == EXCEPTIONS.keys()
    for name in shipped().keys() - says:
        read = Recipe(**read_recipe(name))
        if read.parsed.pulls:
            assert of_method(read.parsed) == PULL, name
            assert (read.warmup, read.betas, read.weight_decay) == (0.05, (0.9, 0.999), 0.01)


def test_one_place():
    """The tests above say numbers; here they are."""
    kappas = {"kappa": defaults.KAPPA, "return_kappa": defaults.RETURN_KAPPA}
    assert {"pullback": defaults.PULLBACK, "gain": defaults.GAIN, **kappas} == PULL
