"""What is measured of a checkpoint's pictures, in words, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass

from library.evaluation.denoising import QUARTERS


@dataclass(frozen=True)
class Measure:
    title: str
    meaning: str
    better: int
    """1: higher is better, -1: lower is better, 0: neither."""
    from_base: bool = False
    """Whether it is a distance to the base: that of the base itself is 0, so that no difference to it is tested."""
    by_itself: bool = False
    """Whether it says something whatever the base does, so that it is never noise."""


MEASURES = {
    "likeness": Measure("Likeness", "DINOv2 cosine of pictures to the held-out photos, mean over all pairs.", 1),
    "identity": Measure(
        "Identity",
        "Share of the subject's pictures whose nearest picture, by DINOv2, is one of its own held-out photos, not one of another "
        "subject or class or, where there is only one, of those that the base draws of the same prompts with other seeds.",
        1,
    ),
    "nearness": Measure(
        "Nearness to training pictures",
        "DINOv2 cosine of each of the subject's pictures to the nearest training picture, mean.",
        0,
    ),
    "copies": Measure(
        "Copies",
        "Share of the subject's pictures that are nearer to a training picture than 95 % of real ones are: of the held-out photos "
        "to training pictures, and of these to each other.",
        -1,
        by_itself=True,
    ),
    "drift": Measure(
        "Drift",
        "1 - DINOv2 cosine between pictures with and without the adapter, of unrelated prompts and the same seed.",
        -1,
        from_base=True,
    ),
    "drift_pixels": Measure(
        "Drift in pixels",
        "Root mean square difference of the same pairs of pictures, where white is 1.",
        -1,
        from_base=True,
    ),
    "adherence": Measure("Adherence", "CLIP cosine of pictures of unrelated prompts to their prompts.", 1),
    "adherence_subject": Measure(
        "Adherence, subject",
        "CLIP cosine of the subject's pictures to their prompts. CLIP does not know a new word.",
        1,
    ),
    "diversity": Measure(
        "Diversity",
        "1 - DINOv2 cosine between seeds of one prompt of the subject, divided by the base's.",
        0,
    ),
    "kid": Measure("KID", "Unbiased kernel distance of the subject's pictures to the photos, on DINOv2.", -1),
    "cmmd": Measure("CMMD", "Unbiased CLIP distance (MMD x 1000) of the subject's pictures to the photos.", -1),
    "loss": Measure(
        "Denoising loss",
        "Log of the loss on the held-out photos divided by the base's, photo by photo: -0.1 is 10 % less.",
        -1,
    ),
    **{
        f"loss_q{quarter}": Measure(
            f"Loss, quarter {quarter}", f"The same on quarter {quarter} of the timesteps; 1 is the least noise.", -1
        )
        for quarter in range(1, QUARTERS + 1)
    },
}
