"""Arms side by side, paired by seed: what differs beyond the spread of the differences, as tables and sentences. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.evaluation.standard_errors import CONFIDENCE, Estimate

Numbers = Mapping[str, float]
"""Measure -> value, of one run."""
Seeds = Mapping[int, Numbers]
"""Seed -> numbers, of an arm."""


def with_numbers(seeds: Mapping[str, Numbers]) -> Seeds:
    """As JSON has it -> as it is compared."""
    return {int(seed): one for seed, one in seeds.items()}


@dataclass(frozen=True)
class Measure:
    title: str
    meaning: str
    better: int
    """1: more is better, -1: less is, 0: neither."""
    group: str


DRAWN, KEPT, LOSS, FEATURES = "What it draws", "What it keeps", "Denoising loss", "Features"
GROUPS = (DRAWN, KEPT, LOSS, FEATURES)
MEASURES = {
    "right": Measure(
        "Read right",
        "Share of the pictures of new things on which a classifier, trained on renders of all kinds, reads what was asked for.",
        1,
        DRAWN,
    ),
    "kid": Measure(
        "KID",
        "Unbiased kernel distance of these pictures to the held-out ones, on that classifier's last features, whose root mean "
        "square over the held-out ones is 1.",
        -1,
        DRAWN,
    ),
    "likeness": Measure(
        "Likeness", "Cosine to the held-out pictures of the same kind, by the teacher's CLS token.", 1, DRAWN
    ),
    "likeness_margin": Measure(
        "Likeness, own above other", "The same, less the mean cosine to held-out pictures of the other kinds.", 1, DRAWN
    ),
    "likeness_clip": Measure("Likeness by CLIP", "Likeness by a CLIP, from which no run has learned.", 1, DRAWN),
    "diversity": Measure("Diversity", "1 - teacher's cosine between seeds of one prompt.", 0, DRAWN),
    "drift": Measure(
        "Drift", "1 - teacher's cosine of pictures of unrelated prompts, with the adapter and without.", -1, KEPT
    ),
    "drift_pixels": Measure(
        "Drift in pixels", "Root mean square difference of these pairs, as a share of white.", -1, KEPT
    ),
    "right_old": Measure(
        "Old things read right",
        "Share of the pictures of unrelated prompts on which the classifier reads what was asked for.",
        1,
        KEPT,
    ),
    "loss": Measure("Loss", "Log of the loss on held-out pictures over the base's: -0.1 is 10 % less.", -1, LOSS),
    **{
        f"loss_q{quarter}": Measure(
            f"Loss, quarter {quarter}",
            f"The same in quarter {quarter} of the timesteps; 1 is the least noise.",
            -1,
            LOSS,
        )
        for quarter in (1, 2, 3, 4)
    },
    "linear_probe": Measure("Linear probe", "Accuracy on held-out pictures, mean over the timesteps.", 1, FEATURES),
    "knn_accuracy": Measure("kNN", "Accuracy of nearest neighbours, mean over the timesteps.", 1, FEATURES),
    "mutual_knn": Measure("Mutual kNN", "Share of nearest pictures that are the teacher's nearest too.", 1, FEATURES),
    "token_cosine": Measure(
        "Token cosine", "Cosine to the teacher's tokens of a linear head fitted anew on the trunk.", 1, FEATURES
    ),
    "token_cosine_centred": Measure(
        "Token cosine, centred", "The same after each side lost its mean token: a constant gets 0.", 1, FEATURES
    ),
}


@dataclass(frozen=True)
class Compared:
    """An arm against the one without alignment, in one measure."""

    measure: str
    gap: Estimate
    """Mean of the differences, seed by seed, and their spread."""
    better_in: int
    """Seeds in which the difference is to the good; of measures that are neither, in which it is above 0."""
    seeds: int

    @property
    def p_value(self) -> float:
        """Of Student's paired test, two-sided: how often chance alone would give a mean as far from 0. nan for one seed."""
        from scipy.stats import t

        gap = self.gap
        if not gap.freedom or math.isnan(gap.error):
            return math.nan
        return float(2 * t.sf(abs(gap.value) / gap.error, gap.freedom)) if gap.error else float(gap.value == 0)

    @property
    def verdict(self) -> str:
        """What the difference is, in words; within its spread it is none."""
        if self.seeds < 2:
            return "one seed: no spread"
        if not self.gap.is_significant:
            return "no difference beyond the spread"
        direction = MEASURES[self.measure].better
        if not direction:
            return "more" if self.gap.value > 0 else "less"
        return "better" if self.gap.value * direction > 0 else "worse"


def compare(without: Seeds, with_: Seeds) -> list[Compared]:
    """Measure by measure over the seeds that both arms have, in the order of `MEASURES`."""
    seeds = sorted(without.keys() & with_.keys())
    if not seeds:
        return []
    found = []
    for name, measure in MEASURES.items():
        if all(name in arm[seed] for arm in (without, with_) for seed in seeds):
            gaps = [with_[seed][name] - without[seed][name] for seed in seeds]
            good = sum(gap * (measure.better or 1) > 0 for gap in gaps)
            found.append(Compared(name, mean_of_seeds(gaps), good, len(seeds)))
    return found


def significant_among(arms: Mapping[str, Sequence[Compared]]) -> dict[str, set[str]]:
    """Arm -> the measures in which it still differs when each measure's comparisons are corrected for the number of arms.

    arms: arm -> `compare(without, arm)`. Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    found: dict[str, set[str]] = {arm: set() for arm in arms}
    for measure in MEASURES:
        found_here = {arm: one.p_value for arm, some in arms.items() for one in some if one.measure == measure}
        values = {arm: value for arm, value in found_here.items() if not math.isnan(value)}
        for place, arm in enumerate(sorted(values, key=lambda one: values[one])):
            if not values[arm] <= (1 - CONFIDENCE) / (len(values) - place):
                break
            found[arm].add(measure)
    return found


def overview(without: Seeds, arms: Mapping[str, Seeds]) -> list[str]:
    """The Markdown lines of a table of all arms: a row for each measure, differences from `without`, in bold what is left of them
    after the correction for the number of arms, and a sentence that says so. arms: heading -> arm."""
    compared = {arm: compare(without, one) for arm, one in arms.items()}
    left = significant_among(compared)
    lines = [f"| with - without | {' | '.join(arms)} |", f"|---|{'---|' * len(arms)}"]
    for name, measure in MEASURES.items():
        row = {arm: one for arm, some in compared.items() for one in some if one.measure == name}
        if row:
            cells = [
                "" if arm not in row else f"**{signed(row[arm].gap)}**" if name in left[arm] else signed(row[arm].gap)
                for arm in arms
            ]
            lines.append(f"| {measure.title}{_ARROWS[measure.better]} | {' | '.join(cells)} |")
    told = []
    for arm, some in compared.items():
        words = [one.verdict for one in some if one.measure in left[arm]]
        counts = [f"{words.count(word)} {word}" for word in ("better", "worse", "more", "less") if word in words]
        told += [f"{arm}: {' and '.join(counts)}"] if counts else []
    said = (
        f"Bold: what differs from 0 also when each row is corrected for its {len(arms)} arms (Holm): chance alone would mark "
        f"something in one row of twenty. {'; '.join(told) if told else 'Nothing is left after it'}."
    )
    return [*lines, "", said]


def mean_of_seeds(values: Sequence[float]) -> Estimate:
    """Mean, its standard error and degrees of freedom; one value has no spread."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(statistics.fmean(values), error, count - 1)


def table(base: Numbers, without: Seeds, with_: Seeds, title: str) -> list[str]:
    """The Markdown lines of the comparison, a row for each measure, under the headings of the groups."""
    lines = [
        f"| | untouched base | without | with ({title}) | with - without | better in | |",
        "|---|---|---|---|---|---|---|",
    ]
    compared = compare(without, with_)
    for group in GROUPS:
        rows = [one for one in compared if MEASURES[one.measure].group == group]
        lines += [f"| **{group}** | | | | | | |"] if rows else []
        for one in rows:
            measure = MEASURES[one.measure]
            cells = [
                f"{measure.title}{_ARROWS[measure.better]}",
                _number(base.get(one.measure)),
                _range([without[seed][one.measure] for seed in sorted(without)]),
                _range([with_[seed][one.measure] for seed in sorted(with_)]),
                signed(one.gap),
                f"{one.better_in} of {one.seeds}" if measure.better else "",
                f"**{one.verdict}**" if one.gap.is_significant else one.verdict,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def findings(without: Seeds, with_: Seeds) -> list[str]:
    """A sentence on the whole, then one for each group of measures: only what differs beyond its spread is called different."""
    compared = compare(without, with_)
    if not compared or compared[0].seeds < 2:
        return ["There is one seed, so nothing is known of the spread, and nothing can be said."]
    judged = [one for one in compared if MEASURES[one.measure].better]
    better, worse = ([one for one in judged if one.verdict == word] for word in ("better", "worse"))
    said = [
        f"Of {len(judged)} numbers, with alignment {len(better)} better beyond the spread, {len(worse)} worse, "
        f"{len(judged) - len(better) - len(worse)} not told apart with {compared[0].seeds} seeds. By chance alone, one in twenty "
        "would be told apart."
    ]
    for group in GROUPS:
        if rows := [one for one in judged if MEASURES[one.measure].group == group]:
            said.append(f"{group}: {_told(rows)}.")
    return said


def _told(rows: Sequence[Compared]) -> str:
    parts = []
    for word in ("better", "worse"):
        if some := [f"{MEASURES[one.measure].title} ({signed(one.gap)})" for one in rows if one.verdict == word]:
            parts.append(f"{word} in {', '.join(some)}")
    if rest := sum(one.verdict not in ("better", "worse") for one in rows):
        whole = f"{rest} numbers" if rest > 1 else "one number"
        parts.append(f"no difference beyond the spread in {whole if not parts else f'the other {rest}'}")
    return "; ".join(parts)


def signed(estimate: Estimate) -> str:
    """With its sign: +0.012 ± 0.004."""
    text = str(estimate)
    return f"+{text}" if estimate.value > 0 and text[0].isdigit() else text.replace("-", "−", 1)


_ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "−")


def _range(values: Sequence[float]) -> str:
    """Mean, and lowest to highest of the seeds."""
    low, high = _number(min(values)), _number(max(values))
    return f"{_number(statistics.fmean(values))} ({low} to {high})" if len(values) > 1 else _number(values[0])
