"""Methods: the table, and what follows from one entry of it."""

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

from paceline.averaging import Averaging, Uniform
from paceline.defaults import AUTO_RETURN_KAPPA, KAPPA, PAPER_KAPPA, RETURN_KAPPA
from paceline.train import InputError, Positive
from paceline.train.data import Corpus, make_tokenizer, tokenize
from paceline.train.methods import (
    LR_SCHEDULES,
    METHODS,
    AveragedMethod,
    Method,
    Setup,
    all_options,
    goes_into_method,
    method_of_row,
    methods_help,
    parse_method,
)
from paceline.train.model import make_gpt2
from paceline.train.recipe import METHOD, RESUMABLE, Recipe, keys_with
from paceline.train.trainer import train_blocks

TEXT = "\n".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs" for i in range(200))


@pytest.fixture
def one_entry():
    """A method that is added in one place: here."""

    class TailMethod(AveragedMethod):
        """The mean of the last steps of AdamW's weights."""

        name = "tail"

        last: Positive = 5

        def averaging(self, steps: int) -> Averaging:
            return Uniform(steps - self.last)

    yield TailMethod
    METHODS.pop("tail")


def test_one_class_adds_a_method(one_entry, tmp_path):
    method = parse_method("tail:wsd:last=3:lr=1e-2")
    assert method == one_entry(lr=1e-2, schedule="wsd", last=3)
    assert method.label == "tail wsd last=3"
    assert parse_method(method.written) == method
    assert method_of_row(method.row) == method
    assert method.trajectory == parse_method("adamw:wsd:lr=1e-2")
    assert "tail: The mean of the last steps of AdamW's weights. Options: last=5, eps." in (
        methods_help()
    )
    assert "last" in all_options()
    with pytest.raises(InputError, match=r"unknown method 'tale'; did you mean 'tail'"):
        parse_method("tale", lr=1.0)
    with pytest.raises(InputError, match=r"no option 'kappa'; it has \['last', 'eps', 'lr'\]"):
        parse_method("tail:kappa=1", lr=1.0)
    with pytest.raises(InputError, match="last: .*greater than or equal to 1, got '0'"):
        parse_method("tail:last=0", lr=1.0)
    recipe = Recipe(config={"model_type": "gpt2"}, tokenizer="bpe", method="tail", lr=0.5)
    assert recipe.parsed == one_entry(lr=0.5)

    tokenizer = make_tokenizer([TEXT], 300)
    tokens = load_file(tokenize(Corpus([TEXT], [TEXT[::-1]]), tokenizer))
    model = make_gpt2(tokenizer, width=16, layers=1, heads=2, positions=16, seed=0)
    trained = train_blocks(
        model,
        tokens,
        [parse_method(text, lr=1e-2) for text in ("adamw", "tail:last=4")],
        tmp_path,
        **{"steps": 12, "batch": 2, "context": 16, "warmup": 2, "weight_decay": 0.1},
        **{"max_grad_norm": 1.0, "seed": 3, "evaluations": 3, "eval_tokens": 512},
    )
    alone, tail = (curve[-1]["returned_loss"] for curve in trained.trainer.curves)
    assert alone == trained.trainer.curves[0][-1]["live_loss"] != tail


def test_a_method_without_an_optimizer_is_refused():
    class Nothing(Method):
        name = "nothing"

    try:
        with pytest.raises(TypeError, match="abstract"):
            Nothing(lr=1.0)
    finally:
        METHODS.pop("nothing")


def test_every_method_says_what_it_is():
    for name, kind in METHODS.items():
        assert kind.name == name
        assert kind.__doc__.endswith(".")
        assert f"{name}: {' '.join(kind.__doc__.split())}" in methods_help()
        method = parse_method(name + ":sgd" * (name == "pullback"), lr=1.0, pullback=2.0)
        assert method_of_row(method.row) == method
        assert set(method.row) == {"name", *all_options()}
        assert method.row["schedule"] == "constant"


def test_rows_of_a_table_may_have_nan_for_no_value():
    method = parse_method("pace:twin:every=3", lr=1.0, pullback=2.0)
    row = {k: float("nan") if x is None else x for k, x in method.row.items()}
    assert method_of_row(row | {"loss": 1.0}) == method


def test_auto_has_its_own_kappas_unless_one_is_given():
    own = (KAPPA, AUTO_RETURN_KAPPA)
    defaults = {"lr": 1.0, "pullback": 2.0, "kappa": 0.5}
    text = parse_method("pace:pullback=auto", **defaults)  # kappa is of the other methods
    command = parse_method("pace", lr=1.0, pullback="auto", kappa=None)
    for method in (text, command):
        assert (method.get("pullback"), method.kappa, method.get("return_kappa")) == ("auto", *own)
    for method in (
        parse_method("pace:pullback=auto:kappa=0.4", **defaults),
        parse_method("pace", lr=1.0, pullback="auto", kappa=0.4),
    ):
        assert (method.get("pullback"), method.kappa) == ("auto", 0.4)
        assert method.get("return_kappa") is None
    recipe = {"config": {"model_type": "gpt2"}, "tokenizer": "bpe", "pullback": "auto"}
    assert (
        Recipe(**recipe).parsed.label == f"pace pullback=auto kappa={own[0]} return_kappa={own[1]}"
    )
    assert Recipe(**recipe, method="ema").parsed.label == f"ema kappa={RETURN_KAPPA}"
    with pytest.raises(InputError, match="pullback=auto is only for pace; give a number >= 0"):
        Recipe(**recipe, method="pullback:sgd")


def test_the_command_gives_what_has_no_default():
    defaults = {"lr": 1.0, "pullback": 2.0, "kappa": 0.7, "twin_gain": 0.4}
    assert parse_method("bema", **defaults).kappa == 0.5  # its own default
    assert parse_method("bema:twin", **defaults).kappa == 0.7  # the schedule's
    assert parse_method("adamw:twin", **defaults).twin_gain == 0.4
    assert parse_method("ema", **defaults).kappa == 0.7
    assert parse_method("ema", lr=1.0).kappa == RETURN_KAPPA
    assert parse_method("pace", lr=1.0, pullback=2.0).kappa == PAPER_KAPPA
    assert parse_method("adamw", **defaults).kappa is None
    assert parse_method("ema:half_life=9", **defaults).kappa is None


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(InputError, match="unknown schedule 'cosin'; did you mean 'cosine'"):
        parse_method("adamw", schedule="cosin", lr=1.0)
    assert {"constant", "cosine", "wsd", "power", "twin"} <= set(LR_SCHEDULES)


def test_keys_of_a_recipe_have_at_most_one_role():
    roles = [type(METHOD)(role) for role in type(METHOD)]
    keys = [keys_with(role) for role in roles]
    assert sum(map(len, keys)) == len(frozenset().union(*keys)) < len(Recipe.model_fields)
    assert keys_with(METHOD, RESUMABLE) == keys_with(METHOD) | keys_with(RESUMABLE)
    assert keys_with(METHOD) == {
        *("method", "lr", "schedule", "pullback", "kappa", "twin_gain", "seed"),
    }


def test_muon_gets_the_hidden_matrices_alone():
    tokenizer = make_tokenizer([TEXT], 300)
    model = make_gpt2(tokenizer, width=16, layers=1, heads=2, positions=16, seed=0)
    decayed = {name for name, p in model.named_parameters() if p.ndim == 2}
    method = parse_method("pullback:muon", lr=1e-3, pullback=1.0)
    optimizer = method.build(Setup(model, decayed, weight_decay=0.1, warmup=0, steps=1))
    for group in optimizer.param_groups:
        for p in group["params"]:
            embedding = p is model.transformer.wte.weight or p is model.transformer.wpe.weight
            assert group["use_muon"] == (p.ndim == 2 and not embedding)
            assert isinstance(p, torch.nn.Parameter)


def test_an_option_of_methods_that_is_no_key_goes_into_the_method():
    """The example is one that can be copied."""
    keys = Recipe.model_fields
    for option in {*all_options()} - {*keys}:
        said, example = goes_into_method(option, keys).split(" --method ")
        assert said == f"{option} goes into the method, as in"
        recipe = Recipe(config={"model_type": "gpt2"}, tokenizer="bpe", method=example)
        assert recipe.parsed.get(option) is not None
    assert goes_into_method("retrun_kappa", keys).startswith("return_kappa goes")
    assert goes_into_method("state_dtype", keys).startswith("state goes")
    for name in ("kapa", "twin_gian", "learning_rate", "xyz"):
        assert goes_into_method(name, keys) is None
