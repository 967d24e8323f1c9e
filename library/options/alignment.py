"""What features of the frozen U-Net are aligned to, and how much that counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.checks import OptionError, not_negative, positive, require, share
from library.options.given import OptionalCount
from library.options.recipes import Recipe, WithRecipes
from library.words import plural
from networks import AdapterError
from networks.taps import check_tap

GRADIENT_EVERY = 50
"""Steps between measurements where only align_stop_on_conflict is given: 1 % of a run for the second backward pass."""

RECIPES: dict[str, Recipe] = {
    "trd": Recipe(
        {
            "token_weight": 0.0,
            "manifold_weight": 1.0,
            "manifold_mode": "token",
            "manifold_loss": "l1",
            "manifold_margin": 0.1,
        },
        "VideoREPA's Token Relation Distillation (arXiv 2505.23656): mean of relu(|G_predicted - G_teacher| - 0.1) over tokens",
    ),
    "irepa": Recipe(
        {"align_head": "conv3x3", "teacher_norm": 0.6, "manifold_weight": 0.0},
        "iREPA (arXiv 2512.10794): 3x3 convolution as head, teacher's tokens normalised picture by picture, token cosine alone",
    ),
}


@dataclass(frozen=True)
class TokenOptions:
    """What is kept of what the teacher sees."""

    dino_resolution: tuple[int, ...] = (518,)
    """Side in pixels of the teacher's input: of DINOv2 518 (its native grid, 37x37), 448 (32x32) or 224 (16x16, 6x cheaper), of
    teachers with patches of 16 pixels 512 (32x32; their default) or 256; of pictures that are no squares the same area. Of several
    teachers one for all, or one for each."""
    teacher_layer: OptionalCount = None
    """Layer of the teacher whose tokens are learned, counted from 1. Default: the last."""
    token_grid: int = 16
    """Teacher tokens are area-pooled to this many rows and columns, or to the same number in the bucket's aspect."""
    token_dtype: Literal["float16", "int8"] = "float16"
    """Number format of cached tokens. int8 keeps a scale per token and halves the store."""

    def __post_init__(self) -> None:
        positive("token_grid", self.token_grid)
        require(bool(self.dino_resolution), "dino_resolution", "is empty.")
        for side in self.dino_resolution:
            require(
                side > 0 and 0 in (side % 14, side % 16),
                "dino_resolution",
                f"must be a multiple of the teacher's patch, DINOv2's 14 (518, 448, 224) or 16 (512, 256, 224), got {side}.",
            )
            require(
                self.token_grid <= side // 14,
                "token_grid",
                f"is {self.token_grid}, finer than the {side // 14} patches that dino_resolution {side} gives. Raise "
                "dino_resolution or lower token_grid.",
            )
        positive("teacher_layer", self.teacher_layer)

    def resolution(self, number: int, patch: int) -> int:
        """Of the teacher of this number, counted from 0; of the default the largest multiple of its patch that is no larger."""
        given = self.dino_resolution[number if len(self.dino_resolution) > 1 else 0]
        return given // patch * patch if self.dino_resolution == TokenOptions.dino_resolution else given


@dataclass(frozen=True)
class AlignmentOptions(TokenOptions, WithRecipes):
    """AlignHeads, which pull features of the U-Net towards those of a vision model."""

    recipe_option: ClassVar[str] = "align_recipe"
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES

    alignment: bool = True
    """Train with AlignHeads, supervised by cached tokens of dino_model. Without, this is plain LoRA training."""
    align_recipe: Literal["trd", "irepa"] | None = None
    """Settings of a paper, for what is not given otherwise: trd (VideoREPA: relations between tokens alone), irepa (3x3 head and
    teacher_norm)."""
    taps: tuple[str, ...] = ("mid",)
    """Blocks of the U-Net after which features get an AlignHead: mid, enc_last, dec_first, any down_blocks.N or up_blocks.N, or
    several of them."""
    tap_weights: tuple[float, ...] = ()
    """How much each of them counts in the mean of their losses. Default: all alike."""
    teacher_weights: tuple[float, ...] = ()
    """The same of the teachers (dino_model)."""
    align_head: Literal["mlp", "linear", "conv3x3"] = "mlp"
    """AlignHead: two 1x1 convolutions with GELU between, one 1x1, or one 3x3 (iREPA)."""
    align_film: bool = False
    """Let the timestep scale and shift what an AlignHead projects (U-REPA's time-aware projector); at first it does nothing."""
    align_coeff: float = 0.5
    """lambda: weight of the alignment losses beside the diffusion loss."""
    align_schedule: Literal["warmup", "constant", "cutoff", "linear", "cosine"] = "warmup"
    """lambda over the steps: constant, or rising over align_warmup_steps and then: staying (warmup), 0 from align_cutoff_step on
    (cutoff), or falling to 0 there along a line or half a cosine."""
    align_warmup_steps: int = 3000
    """Optimizer steps over which lambda rises from 0 (all schedules but constant)."""
    align_cutoff_step: int | None = None
    """Optimizer step from which lambda is 0 (schedules cutoff, linear, cosine; HASTE, arXiv 2505.16792). Default of linear and
    cosine: the end of the run."""
    align_timesteps: Literal["all", "v", "t", "log_snr"] = "all"
    """lambda by the noise of each picture: the same at all, U-REPA's V (half at t = 0.5), or only within align_window, of t or of
    log-SNR. t is the flow's, 0 without noise and 1 of noise alone; other bases align at the same signal-to-noise ratios."""
    align_window: tuple[float, float] | None = None
    """Lowest and highest t or log-SNR at which pictures are aligned (align_timesteps t, log_snr). 0.1 1: all but little noise."""
    align_stop_on_plateau: OptionalCount = None
    """End alignment when the running mean of the token cosine has not risen for so many steps after the warm-up."""
    align_gradient_every: OptionalCount = None
    """Measure the cosine between the adapters' gradients of the diffusion and the alignment loss every so many steps, by a second
    backward pass. Default: 50 with align_stop_on_conflict, else never."""
    align_stop_on_conflict: OptionalCount = None
    """End alignment when the running mean of these cosines has been below 0 in so many measurements in a row (HASTE)."""
    token_weight: float = 1.0
    """Weight of the token loss, 1 - cosine. 0 leaves it out: its value is logged and trains nothing."""
    manifold_weight: float = 3.0
    """w: weight of the manifold loss, the difference of similarities. 0 leaves it out, likewise."""
    manifold_target: Literal["teacher", "latents"] = "teacher"
    """Whose similarities the manifold loss compares with: the teacher's tokens', or those of clean latents, pooled to token_grid
    (SPARE's idea), which takes no teacher and no cache of tokens."""
    manifold_mode: Literal["sample", "token", "random"] = "sample"
    """Gram matrices compared: of pooled samples in the global batch, of the tokens in each image, of random tokens."""
    manifold_loss: Literal["l2", "l1"] = "l2"
    """What a difference of similarities costs: its square, or its amount."""
    manifold_margin: float = 0.0
    """Differences of similarity up to this cost nothing (VideoREPA's margin, arXiv 2505.23656)."""
    manifold_clip: float | None = None
    """Cap on the manifold loss: above it, value and gradient are scaled down to the cap."""
    manifold_random_tokens: int = 192
    """Tokens drawn from the batch in mode random (192: Manifold Distillation's K)."""
    teacher_norm: float = 0.0
    """Share of a picture's mean token that is taken off the tokens to be learned, which are then divided by their spread over the
    picture (iREPA: 0.6). 0 leaves them as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.taps) > 0, "taps", "is empty. Without alignment no heads are trained.")
        require(len(set(self.taps)) == len(self.taps), "taps", f"names a tap twice: {' '.join(self.taps)}.")
        for tap in self.taps:
            try:
                check_tap(tap)
            except AdapterError as error:
                raise OptionError("taps", f"has {tap!r}. {error}") from None
        require(
            len(self.tap_weights) in (0, len(self.taps)),
            "tap_weights",
            f"has {plural(len(self.tap_weights), 'number')} for {plural(len(self.taps), 'tap')}: give one for each, or none.",
        )
        for name in ("tap_weights", "teacher_weights"):
            require(all(weight > 0 for weight in getattr(self, name)), name, "must all be positive.")
        require(
            self.manifold_target == "teacher" or (self.token_weight == 0 and self.manifold_weight > 0),
            "manifold_target",
            "latents has no tokens to predict, only similarities. Give token_weight 0 and a manifold_weight above 0.",
        )
        not_negative("align_coeff", self.align_coeff)
        not_negative("align_warmup_steps", self.align_warmup_steps)
        not_negative("token_weight", self.token_weight)
        not_negative("manifold_weight", self.manifold_weight)
        require(
            self.token_weight > 0 or self.manifold_weight > 0,
            "manifold_weight",
            "and token_weight are both 0: nothing would be aligned. Raise one of them, or use align_coeff 0 to train without.",
        )
        share("teacher_norm", self.teacher_norm)
        for name in ("align_stop_on_plateau", "align_gradient_every", "align_stop_on_conflict"):
            positive(name, getattr(self, name))
        require(
            self.align_stop_on_plateau is None or self.token_weight > 0,
            "align_stop_on_plateau",
            "goes by the token cosine, which nothing raises with token_weight 0. Use align_stop_on_conflict.",
        )
        not_negative("manifold_margin", self.manifold_margin)
        positive("manifold_clip", self.manifold_clip)
        require(self.manifold_random_tokens >= 2, "manifold_random_tokens", "must be at least 2.")
        self._check_schedule()

    @property
    def needs_teacher(self) -> bool:
        """Whether heads learn from a vision model, whose tokens are cached."""
        return self.alignment and self.manifold_target == "teacher"

    @property
    def gradient_every(self) -> int | None:
        """Steps between measurements of the gradient cosine; None where it is never measured."""
        if self.align_gradient_every is None and self.align_stop_on_conflict is not None:
            return GRADIENT_EVERY
        return self.align_gradient_every

    def _check_schedule(self) -> None:
        schedule, cutoff = self.align_schedule, self.align_cutoff_step
        require(
            schedule != "cutoff" or cutoff is not None,
            "align_cutoff_step",
            "is missing, and align_schedule is cutoff.",
        )
        require(
            cutoff is None or schedule in ("cutoff", "linear", "cosine"),
            "align_cutoff_step",
            f"has no effect with align_schedule {schedule}. Use align_schedule cutoff, linear or cosine.",
        )
        not_negative("align_cutoff_step", cutoff)
        require(
            cutoff is None or schedule == "cutoff" or cutoff > self.align_warmup_steps,
            "align_cutoff_step",
            f"is {cutoff}, and lambda rises until align_warmup_steps {self.align_warmup_steps}: nothing is left to fall.",
        )
        windowed = self.align_timesteps in ("t", "log_snr")
        require(
            not windowed or self.align_window is not None,
            "align_window",
            f"is missing: the lowest and highest {self.align_timesteps} at which pictures are aligned.",
        )
        if self.align_window is None:
            return
        require(
            windowed,
            "align_window",
            "has no effect with align_timesteps all. Use align_timesteps t or log_snr."
            if self.align_timesteps == "all"
            else "cuts off where align_timesteps v weighs: give one of them.",
        )
        low, high = self.align_window
        require(low < high, "align_window", f"wants the lower end first, got {low:g} {high:g}.")
