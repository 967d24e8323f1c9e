"""What a person is to do after an evaluation, in a sentence; and which numbers are noise."""

from __future__ import annotations

import math

from library.evaluation.generation_result import BASE, GenerationResult, Strength, copies, follows_less, rises, to_use
from library.evaluation.measure_table import MEASURES


def verdict(result: GenerationResult) -> str:
    """ "dog-000002: as like as the last, half the drift. Use it at 0.8." """
    name = to_use(result)
    if "likeness" in result.best and not rises(result.against_base[result.best["likeness"].name]["likeness"]):
        own, base = result.estimates[result.best["likeness"].name]["likeness"], result.estimates[BASE]["likeness"].value
        return (
            f"No checkpoint is significantly more like the subject than the base ({own}, the base {base:.3f}): train longer, at a "
            "higher learning rate, or judge by more pictures (--num-samples)."
        )
    if "likeness" not in result.best and "loss" not in result.best:
        least = result.best["drift"].name
        return (
            "Which checkpoint to use cannot be told without held-out photos of the subject (--reference_dir). "
            f"{least} drifts least: {result.estimates[least]['drift']}.{_warnings(result, name)}"
        )
    why = ", ".join(_why(result, name))
    return f"{name}: {why}. {_use(result)}{_warnings(result, name)}"


def _warnings(result: GenerationResult, name: str) -> str:
    """What is wrong with the last checkpoint, and with the one to use where it is another."""
    last, words = result.names[-1], ""
    for one in dict.fromkeys((last, name)):
        who = "The last" if one == last != name else one
        if follows_less(result, one):
            words += f" {who} follows prompts less than the base does."
        if copies(result, one):
            share = f"{result.estimates[one]['copies'].value:.0%}"
            words += f" {who} copies training pictures: {share} of its pictures are nearer to one than real ones are to each other."
    return words


def _why(result: GenerationResult, name: str) -> list[str]:
    last, own = result.names[-1], result.estimates[name]
    if name != last:
        return [_likeness_to_last(result, name), _drift_to_last(result, name)]
    if len(result.names) > 1:
        return ["the last, and none is significantly more like or, as like as it, drifts significantly less"]
    another = f", another seed's {result.anchors['drift']:.3f}" if "drift" in result.anchors else ""
    words = [f"drift {own['drift']}{another}"]
    if "likeness" in own:
        words.insert(0, f"likeness {own['likeness']}, the base's {result.estimates[BASE]['likeness'].value:.3f}")
    return words


def _likeness_to_last(result: GenerationResult, name: str) -> str:
    gaps = result.against_last[name]
    if "likeness" in gaps:
        return "more like than the last" if rises(gaps["likeness"]) else "as like as the last"
    gap = gaps["loss"]
    return "less loss than the last" if gap.is_significant and gap.value < 0 else "as little loss as the last"


def _drift_to_last(result: GenerationResult, name: str) -> str:
    last = result.estimates[result.names[-1]]["drift"].value
    if not result.against_last[name]["drift"].is_significant or last <= 0:
        return "and as much drift"
    share = result.estimates[name]["drift"].value / last
    if abs(share - 0.5) <= 0.05:
        return "half the drift"
    return f"{share:.0%} of its drift"


def _use(result: GenerationResult) -> str:
    strength = result.strength
    if strength is None or strength.recommended is None:
        return "Use it."
    return f"Use it at {strength.recommended:g}."


def strength_words(strength: Strength) -> str:
    """What the weights from which a person chooses do."""
    swept, alike = strength.swept, strength.alike
    if "likeness" not in swept.best:
        return (
            "No weight is recommended, because likeness was not measured: that takes held-out photos (--reference_dir)."
        )
    if not alike:
        return (
            "No weight is recommended: at none is likeness significantly above the base's. More pictures (--num-samples) tell "
            "more."
        )
    at, best, end = f"{alike[0]:g}", swept.best["likeness"].name, f"{alike[-1]:g}"
    likeness, drift = (
        {weight: swept.estimates[weight][measure] for weight in swept.names} for measure in ("likeness", "drift")
    )
    if at == best:
        return (
            f"Likeness is highest at {at} ({likeness[at]}) and significantly lower at each weight below. Drift is {drift[at]} "
            "there."
        )
    return (
        f"From {at} on likeness no longer rises beyond its interval: {likeness[at]} there, and {likeness[best]} at {best}, where "
        f"it is highest. From {at} to {end} it does not differ significantly, while drift goes from {drift[at].value:.3f} to "
        f"{drift[end].value:.3f}."
    )


def is_noise(result: GenerationResult, name: str, measure: str) -> bool:
    """Whether a number says nothing: its difference to the base (of a distance to the base, itself) is within its interval."""
    if MEASURES[measure].by_itself:
        return False
    gap = result.estimates[name][measure] if MEASURES[measure].from_base else result.against_base[name][measure]
    return math.isfinite(gap.margin) and not gap.is_significant
