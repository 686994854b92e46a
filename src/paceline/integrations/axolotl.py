"""A plugin for axolotl: PACE and its Trainer, by two keys of the YAML."""

from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..optimizer import PACE
from .transformers import PaceTrainer

ADAMW = ("adamw_torch", "adamw_torch_fused")
OF_AXOLOTL = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
OTHER_TRAINERS = ("rl", "reward_model", "process_reward_model", "trainer_cls")


class PaceArgs(BaseModel):
    """The key `pace`: options of PACE, but for those that axolotl has keys for."""

    pace: dict[str, Any]

    @field_validator("pace")
    @classmethod
    def _fits(cls, options: dict[str, Any]) -> dict[str, Any]:
        """See that PACE takes them. Raises: ValueError: it does not, or axolotl has the key."""
        for name in OF_AXOLOTL.keys() & options.keys():
            raise ValueError(f"{name} is set by axolotl's {OF_AXOLOTL[name]}, got it in pace")
        try:
            PACE([torch.nn.Parameter(torch.zeros(1))], **options)
        except TypeError as error:
            raise ValueError(str(error)) from error
        return options


class PacePlugin(BasePlugin):  # type: ignore[misc]
    """Trains by PACE, and evaluates, saves and returns the average, as `PaceTrainer` does.

        plugins: [paceline.integrations.axolotl.PacePlugin]
        pace: {pullback: auto}
        optimizer: adamw_torch

    Rates, betas, epsilon and weight decay are those of axolotl's own keys.
    """

    def get_input_args(self) -> str:
        """Where the schema of `pace` is."""
        return f"{__name__}.{PaceArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer]:
        """The trainer.

        Raises:
            ValueError: another optimizer is asked for, or one of axolotl's other trainers, in whose
                place axolotl would put this one.
        """
        if cfg["optimizer"] not in ADAMW:
            raise ValueError(
                f"optimizer must be {' or '.join(ADAMW)} beside pace, got {cfg['optimizer']}"
            )
        for key in OTHER_TRAINERS:
            if cfg.get(key):
                raise ValueError(
                    f"pace is for axolotl's plain trainer, got {key}: {cfg[key]}; "
                    "leave out pace, or combine PaceTrainer with a trainer of TRL by hand"
                )
        return type("AxolotlPaceTrainer", (_PaceTrainer,), {"pace": dict(cfg["pace"])})


class _PaceTrainer(PaceTrainer, AxolotlTrainer):  # type: ignore[misc]
    pace: dict[str, Any]

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, Any]:
        """PACE in place of AdamW; `fused` and the like are that one's."""
        _, options = super().get_optimizer_cls_and_kwargs(args, model)
        return PACE, {key: options[key] for key in ("lr", "betas", "eps")} | cls.pace
