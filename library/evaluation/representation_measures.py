"""All measures that compare predicted tokens, or any features, with the teacher's, by name, with their meanings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from library.evaluation.probes import chance_accuracy, knn_accuracy, linear_probe
from library.evaluation.retrieval import cknna, mutual_knn, neighbour_recall, retrieval_recall
from library.evaluation.similarity import (
    centred_token_cosine,
    clamp_outliers,
    linear_cka,
    pool_tokens,
    sample_similarity_mae,
    token_cosine,
)

MEANINGS = {
    "token_cosine": "Cosine with the teacher's token, mean over tokens. Compare it with the rows of constants, not with 0.",
    "token_cosine_centred": "The same after the mean of all tokens was subtracted on each side: a constant gets 0.",
    "token_cosine_by_position": "The same after each position's mean was subtracted: what the position alone predicts is 0.",
    "token_cosine_by_image": "The same after each image's mean token was subtracted: only differences within an image count.",
    "sample_mae": "Mean absolute difference between the teacher's and these similarities of pictures. Lower is better; 0 is equal.",
    "sample_mae_centred": "The same after the mean vector was subtracted on each side.",
    "cka": "Debiased linear CKA of pooled features: 0 is unrelated, 1 equal up to rotation and scale.",
    "cka_biased": "Linear CKA as first published: near 1 for any features with more channels than pictures.",
    "cknna": "CKA on pairs that are neighbours on both sides (REPA's measure).",
    "mutual_knn": "Share of nearest neighbours that are the teacher's nearest neighbours too.",
    "linear_probe": "Accuracy of a linear classifier on pooled features of held-out pictures.",
    "linear_probe_fit": "The linear classifier's accuracy on the pictures that it was fitted on.",
    "knn_accuracy": "Accuracy of a vote of the nearest training pictures.",
}
"""The meanings of all measures except recall@k and retrieval@k; see `meaning`."""


def meaning(measure: str) -> str:
    """A sentence on a measure, for the report."""
    name, _, k = measure.partition("@")
    if name == "recall":
        return f"Share of pictures whose nearest one to the teacher is among the {k} nearest here."
    if name == "retrieval":
        return f"Share of pictures whose own teacher vector is among the {k} nearest to the prediction."
    return MEANINGS[measure]


@dataclass(frozen=True)
class RepresentationMeasures:
    """The measures that `count` held-out pictures allow: those of k neighbours need more than k + 1 pictures."""

    count: int
    neighbours: int
    recall_at: tuple[int, ...]
    probes: bool
    """Whether the pictures have at least two classes."""

    @property
    def ks(self) -> list[int]:
        return [k for k in self.recall_at if k < self.count - 1]

    @property
    def has_neighbours(self) -> bool:
        return self.neighbours < self.count - 1

    def left_out(self) -> list[str]:
        """A sentence for each kind of measure that these pictures do not allow."""
        sentences = []
        if dropped := [k for k in self.recall_at if k not in self.ks]:
            sentences.append(
                f"recall@{', @'.join(map(str, dropped))} is left out: {self.count} held-out pictures are too few."
            )
        if not self.has_neighbours:
            sentences.append(
                f"mutual_knn and cknna are left out: {self.count} pictures are too few for {self.neighbours} neighbours."
            )
        if not self.probes:
            sentences.append("linear_probe and knn_accuracy are left out: all training pictures are of one class.")
        return sentences

    def chance(self, fit_labels: Tensor, test_labels: Tensor) -> dict[str, float]:
        """The value of uninformative features, of measures where that is not 0."""
        others = self.count - 1
        values = {f"recall@{k}": k / others for k in self.ks} | {f"retrieval@{k}": k / self.count for k in self.ks}
        if self.has_neighbours:
            values |= {"mutual_knn": self.neighbours / others, "cknna": self.neighbours / others}
        if self.probes:
            values |= dict.fromkeys(("linear_probe", "knn_accuracy"), chance_accuracy(fit_labels, test_labels))
        return values

    def of_tokens(self, predicted: Tensor, target: Tensor) -> dict[str, float]:
        """Compares tokens in the teacher's space with the teacher's, both [n, N, D]: token by token, and pooled."""
        pooled, teacher = pool_tokens(predicted), pool_tokens(target)
        retrieval = {f"retrieval@{k}": retrieval_recall(pooled, teacher, k) for k in self.ks}
        return of_each_token(predicted, target) | self.of_features(pooled, teacher) | retrieval

    def of_features(self, features: Tensor, teacher: Tensor) -> dict[str, float]:
        """Compares features [n, C] of any space with the teacher's [n, D]. Neighbours are those of clamped features."""
        values = {
            "sample_mae": sample_similarity_mae(features, teacher),
            "sample_mae_centred": sample_similarity_mae(features, teacher, centred=True),
            "cka": linear_cka(features, teacher),
            "cka_biased": linear_cka(features, teacher, debiased=False),
        }
        a, b = clamp_outliers(features), clamp_outliers(teacher)
        if self.has_neighbours:
            values |= {"cknna": cknna(a, b, self.neighbours), "mutual_knn": mutual_knn(a, b, self.neighbours)}
        return values | {f"recall@{k}": neighbour_recall(a, b, k) for k in self.ks}

    def of_probes(
        self, fit: Tensor, fit_labels: Tensor, test: Tensor, test_labels: Tensor, fit_ids: Sequence[str]
    ) -> dict[str, float]:
        """Accuracies of probes fitted on features [m, C] and judged on [n, C]; empty where there is one class."""
        if not self.probes:
            return {}
        probed = linear_probe(fit, fit_labels, test, test_labels, fit_ids)
        neighbours = min(self.neighbours, len(fit))
        return {
            "linear_probe": probed.accuracy,
            "linear_probe_fit": probed.fit_accuracy,
            "knn_accuracy": knn_accuracy(fit, fit_labels, test, test_labels, neighbours),
        }


def of_each_token(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """The measures that compare token by token, both [n, N, D]; valid also for predictions that are equal for all pictures."""
    return {
        "token_cosine": token_cosine(predicted, target),
        "token_cosine_centred": centred_token_cosine(predicted, target, "set"),
        "token_cosine_by_position": centred_token_cosine(predicted, target, "position"),
        "token_cosine_by_image": centred_token_cosine(predicted, target, "image"),
    }
