"""The plugin for axolotl, by its real plugin manager and trainer. Last run: axolotl 0.19.0.

axolotl pins older versions of transformers and TRL than are tested here, so CI is without it. What
builds trainers from a whole YAML file does not import beside TRL 1.16.
"""

import warnings
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from trainers import BATCH, EVAL, TRAIN, logged, small
from trainers import prepare as by_trainer
from transformers import AutoModelForCausalLM, DefaultDataCollator, TrainingArguments

from paceline import PACE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    from axolotl.core.training_args_base import AxolotlTrainingMixins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    from paceline.integrations.axolotl import PaceArgs

NAME = "paceline.integrations.axolotl.PacePlugin"
CONFIG = {"optimizer": "adamw_torch_fused", "pace": {"pullback": 0.1}}


@dataclass
class Arguments(AxolotlTrainingMixins, TrainingArguments):
    """As in axolotl.core.training_args, which does not import beside TRL 1.16."""


@pytest.fixture
def manager():
    found = PluginManager.get_instance()
    found.register(NAME)
    yield found
    found.plugins.pop(NAME)


def by_pace(params):
    return PACE(params, lr=0.05, weight_decay=0.0, pullback=0.1)


def rows(data):
    return Dataset.from_list([{k: x.tolist() for k, x in row.items()} for row in data])


def test_the_trainer_returns_the_average_and_resumes(manager, tmp_path):
    assert manager.get_input_args() == ["paceline.integrations.axolotl.PaceArgs"]
    assert PaceArgs(**CONFIG).pace == CONFIG["pace"]
    kind = manager.get_trainer_cls(DictDefault(CONFIG))

    def prepare():
        arguments = Arguments(
            str(tmp_path), max_steps=6, save_steps=3, eval_steps=3, eval_strategy="steps",
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
            optim=CONFIG["optimizer"], report_to=[], disable_tqdm=True,
            train_sampling_strategy="sequential", dataloader_drop_last=False,
        )  # fmt: skip
        return kind(
            small(), arguments, train_dataset=rows(TRAIN), eval_dataset=rows(EVAL),
            data_collator=DefaultDataCollator(), eval_data_collator=DefaultDataCollator(),
        )  # fmt: skip

    trainer = prepare()
    trainer.train()
    assert isinstance(trainer.bare_optimizer, PACE)
    for steps, found in ((3, tmp_path / "checkpoint-3"), (6, trainer.model)):
        expected = by_trainer(tmp_path / "other", kind=by_pace, max_steps=steps)
        expected.train()  # transformers' own
        if steps == 3:
            found = AutoModelForCausalLM.from_pretrained(found)
        for x, y in zip(found.parameters(), expected.model.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    assert logged(trainer, "eval_loss").keys() == logged(trainer, "eval_live_loss").keys() == {3, 6}
    again = prepare()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for x, y in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "muon"}, "optimizer must be adamw_torch or adamw_torch_fused.*got muon"),
        ({"rl": "dpo"}, "plain trainer, got rl: dpo"),
        ({"trainer_cls": "my.Trainer"}, "plain trainer, got trainer_cls: my.Trainer"),
    ],
)
def test_what_cannot_be_served_is_refused(changes, said, manager):
    with pytest.raises(ValueError, match=said):
        manager.get_trainer_cls(DictDefault(CONFIG | changes))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gain": "adam"}, "pullback must be given"),
        ({"pull": 1}, "'pull'"),
        ({"pullback": -1}, "pullback"),
        ({"pullback": 1, "lr": 1}, "lr is set by axolotl's learning_rate"),
    ],
)
def test_options_that_pace_does_not_take_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        PaceArgs(pace=options)
