"""Rectified flow: whether and how it is trained, and at which noise levels. Names are kohya's, of its scripts for Flux and SD3."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from library.options.checks import finite, positive, require
from library.options.given import OptionalCount
from library.options.recipes import Recipe, WithRecipes

MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Between these the mode density is one (Esser et al. 2024, section 3.1)."""
SHIFT = 2.5
"""Of --timestep_sampling shift, where no other is given: between Lune's 2 and Stable Diffusion 3's 3, and ChenkinNoob RF's own."""

Sampling = Literal["sigma", "uniform", "sigmoid", "shift", "logit_normal", "mode", "bins"]
Scheme = Literal["none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


RECIPES: dict[str, Recipe] = {
    "lune": Recipe(
        {"timestep_sampling": "uniform", "discrete_flow_shift": 2.0},
        "AbstractPhil/sd15-flow-lune as its author's later trainer states it: uniform, shift 2, plain squared error",
    ),
    "chenkin": Recipe(
        {"timestep_sampling": "logit_normal", "discrete_flow_shift": 2.5},
        "ChenkinNoob-XL Rectified Flow: shift 2.5 over the default logit-normal (0, 1) of its authors' fork of sd-scripts",
    ),
    "bigasp": Recipe(
        {"timestep_sampling": "logit_normal"},
        "fancyfeast/bigaspv2-5, SDXL with 'the Flow Matching objective from Flux': its density as SD3's paper has it, no shift",
    ),
}


@dataclass(frozen=True)
class FlowOptions(WithRecipes):
    """Rectified flow (docs/flow.md): of flow bases, and through a bridge of all others."""

    recipe_option: ClassVar[str] = "flow_recipe"
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES

    flow_model: bool = False
    """Train the straight path from noise to picture (rectified flow). Needed for bases that are no flow models themselves."""
    flow_mode: Literal["auto", "bridge", "native"] = "auto"
    """bridge: the base stays what it is, behind an exact conversion; any program loads the adapter. native: the base is a flow
    model already, whose files may not say so. auto: as the base's files say."""
    flow_recipe: Literal["lune", "chenkin", "bigasp"] | None = None
    """Settings of a published model, for what is not given otherwise; docs/flow.md has their sources."""
    timestep_sampling: Sampling | None = None
    """Which sigmas are drawn: uniform (default), sigmoid, shift (sigmoid with discrete_flow_shift), logit_normal, mode, sigma
    (what weighting_scheme names), or bins (uniform, and hard ones more often), which trainings that are no flow take, too."""
    sigmoid_scale: float = 1.0
    """Of sigmoid and shift: spread of the normal before the sigmoid."""
    discrete_flow_shift: float | None = None
    """Shift of the sigmas towards noise, whatever their density, and of the pictures drawn while training. Default: none (1); with
    timestep_sampling shift 2.5."""
    weighting_scheme: Scheme | None = None
    """kohya's: logit_normal and mode are densities, cosmap is a weight of the loss; none, uniform and sigma_sqrt leave the loss on
    velocities as it is."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: float = 1.0
    """Spread of logit_normal."""
    mode_scale: float = 1.29
    """Of mode: how far it leans from uniform, -1 to 1.75."""
    flow_shift_by_resolution: bool = False
    """Shift by the root of a picture's area over flow_base_pixels (Esser et al. 2024): larger pictures need more noise."""
    flow_base_pixels: OptionalCount = None
    """Area that needs no shift. Default: the square that the base was trained at."""
    flow_loss_weight: Literal["none", "sigma", "cosmap", "eps", "lune_min_snr"] = "none"
    """Weight of the velocity loss: sigma; cosmap, 2 / (pi (1 - 2 sigma + 2 sigma^2)); eps, (1 - sigma)^2, the loss on noise then;
    lune_min_snr, of Lune's side module. min_snr_gamma counts beside it."""
    flow_sigma_min: float | None = None
    """Smallest sigma that is trained. Default: 0."""
    flow_sigma_max: float | None = None
    """Largest sigma that is trained. Default: all that the base knows: 1, or 0.936 for SD1.5 and SDXL with flow_mode bridge."""
    show_timesteps: Literal["console", "image"] | None = None
    """Show which sigmas and timesteps would be drawn, and stop: as text, or as timesteps.png in output_dir. Of flows and bins."""

    def __post_init__(self) -> None:
        for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
            finite(name, getattr(self, name))
            positive(name, getattr(self, name))
        finite("logit_mean", self.logit_mean)
        low, high = MODE_SCALES
        require(
            low <= self.mode_scale <= high,
            "mode_scale",
            f"must lie between {low:g} and {high:.4f}, got {self.mode_scale}: beyond them sigmas would run backwards.",
        )
        first, last = self.sigma_range
        require(0 <= first < 1, "flow_sigma_min", f"must be at least 0 and below 1, got {first}.")
        require(0 < last <= 1, "flow_sigma_max", f"must be above 0 and at most 1, got {last}.")
        require(
            first < last, "flow_sigma_min", f"{first} is not below flow_sigma_max {last}; nothing is left to train."
        )
        self._check_one_density()
        self._check_one_shift()

    def _check_one_density(self) -> None:
        by_scheme = self.weighting_scheme in ("logit_normal", "mode")
        require(
            not by_scheme or self.timestep_sampling in (None, "sigma"),
            "weighting_scheme",
            f"{self.weighting_scheme} is a density, and timestep_sampling {self.timestep_sampling} another one. Give one of them.",
        )
        require(
            self.weighting_scheme != "cosmap" or self.flow_loss_weight in ("none", "cosmap"),
            "weighting_scheme",
            f"cosmap weights the loss, and flow_loss_weight {self.flow_loss_weight} does, too. Give one of them.",
        )
        kind = self.kind
        for name, default, kinds in (
            ("sigmoid_scale", 1.0, ("sigmoid", "shift")),
            ("logit_mean", 0.0, ("logit_normal",)),
            ("logit_std", 1.0, ("logit_normal",)),
            ("mode_scale", 1.29, ("mode",)),
        ):
            require(
                getattr(self, name) == default or kind in kinds,
                name,
                f"has no effect with a {kind} density. It belongs to {' and '.join(kinds)}.",
            )

    def _check_one_shift(self) -> None:
        """Two shifts multiply, and nobody sees it."""
        shift, one = self.discrete_flow_shift, "A shift would be applied twice; give one of them."
        require(
            not self.flow_shift_by_resolution or shift in (None, 1),
            "flow_shift_by_resolution",
            f"and discrete_flow_shift {shift} both shift. {one}",
        )
        require(
            self.logit_mean == 0 or shift in (None, 1),
            "logit_mean",
            f"{self.logit_mean} is a shift of {math.exp(self.logit_mean):.3g} already, beside discrete_flow_shift {shift}. {one}",
        )
        require(
            self.flow_base_pixels is None or self.flow_shift_by_resolution,
            "flow_base_pixels",
            "has no effect without flow_shift_by_resolution.",
        )

    @property
    def given(self) -> list[str]:
        """The options that differ from their defaults and their recipe and are of flows alone, but for flow_model and flow_mode."""
        recipe = self.of_recipe({"flow_recipe": self.flow_recipe})
        common = ("timestep_sampling", "show_timesteps") if self.timestep_sampling == "bins" else ()
        return [
            one.name
            for one in dataclasses.fields(self)
            if one.name not in ("flow_model", "flow_mode", *common)
            and getattr(self, one.name) not in (one.default, recipe.get(one.name, one.default))
        ]

    @classmethod
    def of_recipe(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = super().of_recipe(given)
        if given.get("weighting_scheme") in ("logit_normal", "mode"):  # a density of its own
            settings.pop("timestep_sampling", None)
        return settings

    @property
    def kind(self) -> str:
        """The density: uniform, sigmoid, shift, logit_normal, mode, or bins, which is uniform before it is weighed."""
        if self.timestep_sampling in (None, "sigma"):
            return self.weighting_scheme if self.weighting_scheme in ("logit_normal", "mode") else "uniform"
        return self.timestep_sampling

    @property
    def shift(self) -> float:
        if self.discrete_flow_shift is None:
            return SHIFT if self.kind == "shift" else 1.0
        return self.discrete_flow_shift

    @property
    def loss_weight(self) -> str:
        return "cosmap" if self.weighting_scheme == "cosmap" else self.flow_loss_weight

    @property
    def sigma_range(self) -> tuple[float, float]:
        return (
            0.0 if self.flow_sigma_min is None else self.flow_sigma_min,
            1.0 if self.flow_sigma_max is None else self.flow_sigma_max,
        )
