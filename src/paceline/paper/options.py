"""The options of `paceline figure`; importing them loads neither torch nor transformers."""

from pathlib import Path
from typing import Annotated, Literal, Self

import tyro
from pydantic import model_validator

from ..study.options import SharedOptions
from ..train import InputError, unknown
from ..train.recipe import Names


class FigureOptions(SharedOptions):
    """Make figures of the paper at a scale, from the runs that they need.

    No run is repeated, whichever figure asked for it. The same command resumes after a kill, and
    shares the work with other machines that reach the storage.
    """

    figures: tyro.conf.Positional[Annotated[tuple[str, ...], Names]]
    """1 to 20, twin, or all; several separated by commas."""
    scale: Literal["tiny", "small", "paper"] = "tiny"
    """tiny: 2 processor cores, 10 to 90 minutes a figure, less if figures share runs; small: one GPU; paper: the paper's models, data and budgets."""
    run: bool = False
    """Run the missing trainings. Without it, count them, and draw the figures that are complete."""
    recipe: str | None = None
    """Another recipe for the model that is fine-tuned, or pretrained."""
    out: Path | None = None
    """Folder for figures, tables and runs. Default: runs/figures-<scale>."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        from .figures import FIGURES

        for figure in self.figures:
            if figure != "all" and figure not in FIGURES:
                raise InputError(f"figures: {unknown(figure, FIGURES, 'figure')}")
        return self
