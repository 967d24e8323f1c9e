"""The arms of the comparison: lambda alone, or a published way to align at a lambda of its own. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import UserError

WITHOUT = "0"
LAMBDA = 0.5
"""Of a recipe that names none: train_repa.py's default."""


@dataclass(frozen=True)
class Recipe:
    title: str
    words: tuple[str, ...]
    """Options of train_repa.py and train_network.py; {quarter} and {twentieth} stand for parts of the steps."""


RECIPES = {
    "trd": Recipe("relations between tokens (VideoREPA's TRD)", ("--align_recipe", "trd")),
    "irepa": Recipe("a convolution as head, tokens normalised (iREPA)", ("--align_recipe", "irepa")),
    "v": Recipe("lambda by noise, U-REPA's V", ("--align_timesteps", "v")),
    "cutoff": Recipe(
        "none after a quarter of the steps", ("--align_schedule", "cutoff", "--align_cutoff_step", "{quarter}")
    ),
    "conflict": Recipe(
        "until the gradients point apart (HASTE)",
        ("--align_stop_on_conflict", "3", "--align_gradient_every", "{twentieth}"),
    ),
    "latents": Recipe(
        "relations of the clean latents, no teacher",
        ("--manifold_target", "latents", "--token_weight", "0", "--manifold_mode", "token"),
    ),
    "film": Recipe("a head that knows the timestep", ("--align_film",)),
    "clip": Recipe("gradients of the heads clipped apart", ("--align_max_grad_norm", "1")),
}


@dataclass(frozen=True)
class Arm:
    """recipe: of RECIPES, or "" where only lambda differs. Written `0.5`, `trd` or `trd:0.1`."""

    recipe: str
    coefficient: float

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Raises UserError for what names neither a lambda nor a recipe."""
        recipe, _, number = text.rpartition(":") if ":" in text else (text, "", str(LAMBDA))
        if text not in RECIPES and ":" not in text:
            recipe, number = "", text
        try:
            coefficient = float(number)
        except ValueError:
            coefficient = -1.0
        if (recipe and recipe not in RECIPES) or not 0 <= coefficient < float("inf") or (recipe and not coefficient):
            raise UserError(
                f"An arm is a lambda of 0 or more, one of {', '.join(RECIPES)}, or one of these with a lambda above 0, as in "
                f"trd:0.1; got {text!r}."
            )
        return cls(recipe, coefficient)

    def __str__(self) -> str:
        if not self.recipe:
            return f"{self.coefficient:g}"
        return self.recipe if self.coefficient == LAMBDA else f"{self.recipe}:{self.coefficient:g}"

    @property
    def label(self) -> str:
        """In plots and tables."""
        return "without" if str(self) == WITHOUT else f"λ = {self.coefficient:g}" if not self.recipe else str(self)

    @property
    def title(self) -> str:
        """As a heading."""
        at = f"lambda {self.coefficient:g}"
        return f"{RECIPES[self.recipe].title}, {at}" if self.recipe else at

    @property
    def needs_teacher(self) -> bool:
        return self.coefficient > 0 and "latents" not in (RECIPES[self.recipe].words if self.recipe else ())

    def words(self, steps: int) -> list[str]:
        """What it adds to the options that all arms have, but for lambda."""
        parts = {"quarter": max(1, steps // 4), "twentieth": max(1, steps // 20)}
        return [word.format(**parts) for word in RECIPES[self.recipe].words] if self.recipe else []
