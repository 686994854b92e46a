"""PaceTrainer: which metrics are whose, those that trainers gather too, and the best model."""

import functools
import math
from collections import defaultdict, deque

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from problems import same
from torch import nn
from trainers import EVAL, logged, on, prepare, small, tokens, weights
from transformers import Trainer

from paceline import PACE
from paceline.integrations.transformers import PaceTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft
    pytest.mark.usefixtures("quick"),
]


def several(params):
    return PACE(params, lr=0.05, pullback=0.0, returns={"slow": "ema:kappa=0.9", "mean": "uniform"})


# ---- what a trainer gathers ------------------------------------------------------------------


class Gathering(Trainer):
    """Gathers a number of each batch; how is up to each of those below."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        self.gather(loss.item())
        return loss, *others


class InStores(Gathering):
    """As TRL's: a store of lists for each mode, which `log` empties."""

    def __init__(self, *args, **kwargs):
        self._of_a_new_name = {"eval": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def gather(self, x):
        self._of_a_new_name["eval"]["gathered"].append(x)

    def log(self, logs, start_time=None):
        if "loss" not in logs:
            for key, values in self._of_a_new_name["eval"].items():
                logs[f"eval_{key}"] = sum(values) / len(values)
            self._of_a_new_name["eval"].clear()
        super().log(logs, start_time)


class WithoutPrefix(InStores):
    """Its keys are complete; its store is replaced."""

    def log(self, logs, start_time=None):
        values = self._of_a_new_name.pop("eval")["gathered"]
        self._of_a_new_name = {"eval": defaultdict(list)}
        logs |= {"gathered": max(values)} if values else {}
        super(InStores, self).log(logs, start_time)


class Deriving(InStores):
    """Derives metrics from others of their names."""

    def log(self, logs, start_time=None):
        losses = [key for key in logs if key.endswith("_loss")]
        logs |= {f"{key.removesuffix('loss')}perplexity": math.exp(logs[key]) for key in losses}
        super().log(logs, start_time)


class InNumbers(Gathering):
    """Sums up, and is read by its own `evaluate`."""

    total = count = 0

    def __init__(self, *args, **kwargs):
        self.total = self.count = 0
        super().__init__(*args, **kwargs)

    def gather(self, x):
        self.total += x
        self.count += 1

    def evaluate(self, *args, **kwargs):
        self.total = self.count = 0
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"eval_gathered": self.total / self.count}


class InAList(Gathering):
    """Is read by its own `evaluate`, and is not emptied by others."""

    def __init__(self, *args, **kwargs):
        self.values = []
        super().__init__(*args, **kwargs)

    def gather(self, x):
        self.values.append(x)

    def evaluate(self, *args, **kwargs):
        self.values.clear()
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"eval_gathered": sum(self.values)}


def plain(trainer, host):
    """What the trainer without ours says of the model as it is."""
    mine, optimizer = type(trainer), trainer.optimizer
    trainer.__class__, trainer.optimizer = host, None
    try:
        found = host.evaluate(trainer) | trainer.state.log_history[-1]
    finally:
        trainer.__class__, trainer.optimizer = mine, optimizer
    apart = ("runtime", "per_second", "time", "epoch", "step", "tokens")
    return {k: x for k, x in found.items() if not k.endswith(apart)}


def check_against_plain(trainer, host):
    """Every metric that the host has of a model is reported of that model, under its name."""
    found = trainer.evaluate()
    entry = next(x for x in reversed(trainer.state.log_history) if "eval_loss" in x)
    with trainer.averaged():
        returned = plain(trainer, host)
    with trainer.live():
        live = plain(trainer, host)
    names = set()
    for key in returned:
        assert (found | entry)[key] == pytest.approx(returned[key], abs=1e-5), key
        name = f"eval_live_{key.removeprefix('eval_')}"
        names.add(name)
        if host not in (InNumbers, InAList):  # their `evaluate` knows of one model
            assert found[name] == entry[name] == pytest.approx(live[key], abs=1e-5), key
    assert {x for x in entry if x.startswith("eval_live_")} <= names
    assert any(abs(returned[key] - live[key]) > 1e-3 for key in returned if key != "eval_loss")
    return found, returned


@pytest.mark.parametrize("host", [InStores, WithoutPrefix, Deriving, InNumbers, InAList])
def test_what_a_trainer_gathers_is_of_one_model_each(host, tmp_path):
    mine = type("Mine", (PaceTrainer, host), {})
    trainer = prepare(tmp_path, several, cls=mine, prediction_loss_only=True)
    trainer.train()
    found, returned = check_against_plain(trainer, host)
    if host is InStores:
        with trainer.bare_optimizer.averaged("mean"):
            mean = plain(trainer, host)
        assert found["eval_mean_gathered"] == pytest.approx(mean["eval_gathered"], abs=1e-5)
        assert abs(mean["eval_gathered"] - returned["eval_gathered"]) > 1e-3


@pytest.mark.filterwarnings("ignore")  # TRL's, of what is experimental
@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_the_second_store_of_trl_is_of_one_model_each(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module = pytest.importorskip(f"trl.experimental.{name}")
    host = getattr(module, f"{name.upper()}Trainer")
    rows = [
        {"prompt": f"{i % 7}", "chosen": f"{i % 11}", "rejected": f"{(3 * i + 1) % 16}"}
        for i in range(24)
    ]
    words = tokens()
    words.add_special_tokens({"bos_token": "1"})
    trainer = prepare(
        tmp_path,
        cls=type("Mine", (PaceTrainer, host), {}),
        config=getattr(module, f"{name.upper()}Config"),
        train_dataset=Dataset.from_list(rows[:16]),
        eval_dataset=Dataset.from_list(rows[16:]),
        processing_class=words,
        eval_strategy="steps",
        eval_steps=3,
        max_length=8,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer.train()
    assert logged(trainer, "eval_live_rewards/chosen").keys() == {3, 6}
    check_against_plain(trainer, host)


class Showing(Trainer):
    """Shows texts of the last evaluation where it logs, as TRL's trainers that generate do."""

    def __init__(self, *args, **kwargs):
        self.log_completions = True
        self._texts = {"completion": deque(["of training"], maxlen=100)}
        super().__init__(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        found = super().prediction_step(model, inputs, *args, **kwargs)
        self._texts["completion"].append(found[0].item())
        return found

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if self.log_completions and "loss" not in logs:
            self.model.shown.append([*self._texts["completion"]])


@pytest.mark.parametrize("kind", ["pace", "adamw"])
def test_texts_are_shown_once_and_are_the_returned_models(kind, tmp_path):
    trainer = prepare(tmp_path, kind, cls=type("Mine", (PaceTrainer, Showing), {}))
    trainer.model.shown = []
    trainer.train()
    trainer.model.shown.clear()
    metrics = trainer.evaluate()
    (shown,) = trainer.model.shown
    assert shown[0] == "of training"
    assert len(shown) == 1 + math.ceil(len(EVAL) / 4)
    assert sum(shown[1:]) / len(shown[1:]) == pytest.approx(metrics["eval_loss"], abs=1e-5)


class Engine(Trainer):
    """Generates by a copy of the weights, loaded once a step, as TRL's trainers by vLLM."""

    _last_loaded_step = -1

    def engine(self):
        if self._last_loaded_step != self.state.global_step:
            self.model.engine = weights(self.model)
            self._last_loaded_step = self.state.global_step
        return self.model.engine

    def training_step(self, model, *args):
        self.check(model)
        return super().training_step(model, *args)

    def prediction_step(self, model, *args, **kwargs):
        self.check(model)
        return super().prediction_step(model, *args, **kwargs)

    def check(self, model):
        assert same(self.engine(), weights(model))


def test_the_engine_that_generates_has_the_weights_of_the_model(tmp_path):
    trainer = prepare(
        tmp_path,
        several,
        cls=type("Mine", (PaceTrainer, Engine), {}),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    for event in ("on_step_begin", "on_pre_optimizer_step"):  # the engine has the step's weights
        trainer.add_callback(on(event, lambda *_, **__: trainer.predict(EVAL)))
    trainer.train()
    trainer.evaluate()


# ---- the best model --------------------------------------------------------------------------


CHOOSING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "greater_is_better": False,
}


def never(*_, **__):
    raise AssertionError("it has begun")


@pytest.mark.parametrize(
    ("metric", "whose", "instead"),
    [
        ("eval_live_loss", "the live weights", "eval_loss"),
        ("live_loss", "the live weights", "eval_loss"),
        ("eval_mean_loss", "the average 'mean'", "eval_loss"),
        ("eval_one_live_loss", "the live weights", "eval_one_loss"),
        ("one_mean_spread", "the average 'mean'", "eval_one_spread"),
    ],
)
def test_a_metric_of_other_weights_than_those_that_are_kept_is_refused(
    metric, whose, instead, tmp_path
):
    sets = {"one": EVAL[:4], "two": EVAL[4:]}
    trainer = prepare(
        tmp_path, several, eval_dataset=sets, metric_for_best_model=metric, **CHOOSING
    )
    trainer.add_callback(on("on_train_begin", never))
    with pytest.raises(ValueError, match=f"measures {whose}, but .* name '{instead}'") as error:
        trainer.train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (several, CHOOSING | {"save_strategy": "no", "load_best_model_at_end": False}),
        ("adamw", CHOOSING),  # it has no others
    ],
)
def test_where_nothing_else_is_kept_by_it_a_live_metric_may_be_watched(kind, options, tmp_path):
    trainer = prepare(tmp_path, kind, metric_for_best_model="eval_live_loss", **options)
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_live_loss").values())


@pytest.mark.parametrize(
    ("names", "kind", "refused"),
    [
        (["live"], "pace", "live"),
        (["live"], "adamw", "live"),
        (["mean", "other"], several, "mean"),
        (["a", "a_live"], "pace", "a_live"),
        (["mean_live"], several, None),
        (["lively", "slow"], several, None),  # the first average has no name in metrics
    ],
)
@pytest.mark.parametrize("begin", ["train", "evaluate", "evaluate these"])
def test_an_evaluation_set_that_is_called_as_an_average_is_refused(
    names, kind, refused, begin, tmp_path
):
    sets = dict.fromkeys(names, EVAL[:4])
    given = {} if begin == "evaluate these" else {"eval_dataset": sets}
    trainer = prepare(tmp_path, kind, **given, max_steps=1, eval_strategy="steps", eval_steps=1)
    calls = {"train": trainer.train, "evaluate": trainer.evaluate}
    call = calls.get(begin, functools.partial(trainer.evaluate, sets))
    if refused is None:
        call()
        return
    trainer.add_callback(on("on_step_begin", never))
    with pytest.raises(ValueError, match=f"the evaluation set '{refused}' is called as an average"):
        call()


def test_a_metric_of_two_models_is_refused(tmp_path):
    trainer = prepare(tmp_path, compute_metrics=lambda _: {"live_loss": 1.0})
    with pytest.raises(ValueError, match="the metric eval_live_loss would be of two models"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="the evaluation set 'eval_live' is called as an average"):
        trainer.evaluate(EVAL, metric_key_prefix="eval_live")


# ---- running statistics ----------------------------------------------------------------------


def test_a_model_with_running_statistics_is_warned_of_once(tmp_path, recwarn):
    for kind, layer, expected in (
        ("pace", nn.BatchNorm1d(8), "BatchNorm1d"),
        ("pace", nn.SyncBatchNorm(8), "SyncBatchNorm"),
        ("pace", nn.InstanceNorm2d(8, track_running_stats=True), "InstanceNorm2d"),
        ("pace", nn.InstanceNorm2d(8), None),
        ("adamw", nn.BatchNorm1d(8), None),
    ):
        model = small()
        model.unused = layer
        trainer = prepare(tmp_path, kind, model, max_steps=2, eval_strategy="steps", eval_steps=1)
        recwarn.clear()
        trainer.train()
        told = [str(x.message) for x in recwarn if "running statistics" in str(x.message)]
        assert len(told) == (expected is not None)
        assert not told or (f"({expected})" in told[0] and "\n" not in told[0])
