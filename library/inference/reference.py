"""A photo as the teacher of a training sees it, for its AlignHeads to steer drawing by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from library.diffusion.alignment_losses import normalize, spatially_normalised
from library.errors import UserError
from library.inference.picture_request import Reference, fitted_picture
from library.inference.token_guidance import TokenGuidance
from library.models.base_family import family_of
from library.models.encoders import TeacherEncoder, grid_in_aspect
from library.models.fingerprint import weight_fingerprint
from library.models.load import unet_config
from library.models.locate import DINOV2, BaseLocation, dino_status, locate_dino
from library.models.teachers import load_teacher
from networks import AdapterError
from networks.align_head import AlignHeads, head_key
from networks.families import FAMILIES
from networks.taps import tap_channels


@dataclass
class ReferenceHeads:
    """AlignHeads of a training state, and how its teacher was shown pictures.

    base_model, family: of the state. teacher: where it is. teacher_weights: its hash in training, as `weight_fingerprint` makes it;
    None where nobody knows. cache_dir: where hashes are remembered. layer, resolution, grid, norm: teacher_layer, dino_resolution,
    token_grid and teacher_norm of the training.
    """

    state: Path
    heads: AlignHeads
    base_model: str
    family: str
    teacher: str
    teacher_weights: str | None
    cache_dir: Path
    layer: int | None
    resolution: int
    grid: int
    norm: float
    _encoder: TeacherEncoder | None = field(default=None, init=False)
    _targets: dict[tuple[Path, tuple[int, int]], torch.Tensor] = field(default_factory=dict, init=False)

    def check_base(self, base: BaseLocation) -> None:
        """Raise UserError where the heads do not read this base's features."""
        family = family_of(base)
        if family.key != self.family:
            raise UserError(
                f"The AlignHeads of {self.state} are of {FAMILIES[self.family].title}, and {base.name} is of {family.title}. Name "
                f"the base that they were trained on, {self.base_model}, or one like it."
            )
        try:
            there = tap_channels(unet_config(base, families=(family,)), list(self.heads))
        except AdapterError as error:
            raise UserError(f"The AlignHeads of {self.state} do not fit {base.name}. {error}") from None
        for tap, shape in there.items():
            if (known := self.heads.get_parameter(f"{head_key(tap)}.proj.0.weight").shape[1]) != shape.channels:
                raise UserError(
                    f"The AlignHeads of {self.state} read {known} channels at {tap}, and {base.name} has {shape.channels} there. "
                    f"Name the base that they were trained on, {self.base_model}, or one like it."
                )

    def check_teacher(self) -> None:
        """Raise UserError where the teacher is not the one that the heads learned from. The hub is asked for one that is absent."""
        found = weight_fingerprint(locate_dino(self.teacher), DINOV2, self.cache_dir)
        if self.teacher_weights not in (None, found):
            raise UserError(
                f"{self.teacher} is not the teacher that the AlignHeads of {self.state} learned from: its weights differ. Name "
                "that one with --dino_model."
            )

    def missing(self) -> str | None:
        """A sentence where the teacher is not on this machine."""
        return dino_status(self.teacher)

    def guidance(self, reference: Reference, width: int, height: int, device: torch.device) -> TokenGuidance:
        """For pictures of this size, to whose aspect the photo is cropped. Raises UserError for a photo that cannot be read."""
        grid = grid_in_aspect(self.grid, width, height)
        key = (reference.photo, (width, height))
        if key not in self._targets:
            picture = fitted_picture(reference.photo, width, height, "align_reference")
            self._targets[key] = self.target(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], device)[0]
        return TokenGuidance(self.heads.to(device), self._targets[key], grid, reference.strength, reference.window)

    def target(self, pixels: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """What the heads learned to say of pictures uint8 [B, 3, H, W]: unit vectors [B, N, D] float32."""
        if self._encoder is None:
            teacher = load_teacher(self.teacher, self.layer, device=device)
            self._encoder = TeacherEncoder(teacher, self.resolution, self.grid)
        return normalize(spatially_normalised(self._encoder.encode(pixels).float(), self.norm))
