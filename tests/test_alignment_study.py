"""The comparison of docs/does_alignment_help.md: pairing by seed, what is called a difference, the page's marks, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from library.evaluation.standard_errors import Estimate
from library.files import write_json
from library.options.network import parse_network_options
from library.options.repa import parse_repa_options
from tools.alignment_study import claim, page, training
from tools.alignment_study.arms import RECIPES, Arm
from tools.alignment_study.commands import ema_decay, plan_of, train_command
from tools.alignment_study.compare import Compared, compare, findings, mean_of_seeds, overview, significant_among, table
from tools.alignment_study.settings import Folders, Run, Settings, make_runs
from tools.does_alignment_help import main

ROOT = Path(__file__).resolve().parents[1]
# Seeds move likeness by 0.1, alignment by 0.01: only pairs show it. Drift moves with the seed alone.
WITHOUT = {
    1: {"likeness": 0.50, "drift": 0.20},
    2: {"likeness": 0.60, "drift": 0.24},
    3: {"likeness": 0.40, "drift": 0.22},
}
WITH = {
    1: {"likeness": 0.511, "drift": 0.24},
    2: {"likeness": 0.609, "drift": 0.22},
    3: {"likeness": 0.41, "drift": 0.20},
}


STUDY: dict[str, Any] = {
    "base": {},
    "arms": {arm: {str(seed): one for seed, one in seeds.items()} for arm, seeds in (("0", WITHOUT), ("0.5", WITH))},
    "photos_among_themselves": 0.7,
}


def test_what_a_seed_does_to_both_arms_cancels() -> None:
    likeness, drift = compare(WITHOUT, WITH)
    assert likeness.gap.value == pytest.approx(0.01)
    assert (likeness.verdict, likeness.better_in) == ("better", 3)
    assert drift.verdict == "no difference beyond the spread"
    assert drift.better_in == 2  # less is better


def test_a_difference_turned_around_is_worse_and_of_the_same_size() -> None:
    there, back = compare(WITHOUT, WITH)[0], compare(WITH, WITHOUT)[0]
    assert back.verdict == "worse"
    assert back.gap.value == pytest.approx(-there.gap.value)
    assert back.gap.margin == pytest.approx(there.gap.margin)


def test_seeds_that_one_arm_lacks_are_left_out() -> None:
    more = {**WITHOUT, 9: {"likeness": 0.0, "drift": 9.0}}
    assert compare(more, WITH) == compare(WITHOUT, WITH)


def test_one_seed_tells_nothing_apart() -> None:
    one, other = {1: WITHOUT[1]}, {1: WITH[1]}
    assert {found.verdict for found in compare(one, other)} == {"one seed: no spread"}
    assert "nothing can be said" in findings(one, other)[0]


def test_sentences_call_different_only_what_is() -> None:
    said = findings(WITHOUT, WITH)
    assert said[0].startswith(
        "Of 2 numbers, with alignment 1 better beyond the spread, 0 worse, 1 not told apart with 3 seeds"
    )
    assert any(one.startswith("What it draws: better in Likeness (+0.0100 ± 0.002") for one in said)
    assert "What it keeps: no difference beyond the spread in one number." in said


def test_a_row_has_base_arms_difference_and_verdict() -> None:
    row = next(line for line in table({"likeness": 0.3}, WITHOUT, WITH, "lambda 0.5") if line.startswith("| Likeness"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["Likeness ↑", "0.300", "0.500 (0.400 to 0.600)", "0.510 (0.410 to 0.609)"]
    assert cells[5:] == ["3 of 3", "**better**"]


def test_results_replace_results_of_their_part_and_nothing_else() -> None:
    other = f"{page.begin('first')}\nkept\n{page.end('first')}"
    before = f"# Title\n\n{page.begin('control')}\nold\n{page.end('control')}\n\nafter\n{other}\n"
    once = page.put_between_marks(before, "new", "control")
    assert once == f"# Title\n\n{page.begin('control')}\n\nnew\n\n{page.end('control')}\n\nafter\n{other}\n"
    assert page.put_between_marks(once, "new", "control") == once


@pytest.mark.parametrize(
    "broken",
    ["no marks", f"{page.end('first')}\n{page.begin('first')}", f"{page.begin('first')}\n" * 2 + page.end("first")],
)
def test_a_page_without_its_marks_is_refused(broken: str) -> None:
    with pytest.raises(UserError, match="lost the marks"):
        page.put_between_marks(broken, "new", "first")


@pytest.mark.parametrize("part", page.PARTS)
def test_the_page_in_the_repository_says_what_its_results_say(part: str) -> None:
    place = page.Place(ROOT / "docs", part)
    assert place.written() == place.read()


def test_without_a_part_the_page_is_one_of_its_own(tmp_path: Path) -> None:
    place = page.Place(tmp_path, "")
    from_results = ["--from_results", "--out", str(tmp_path)]
    assert main(from_results) == EXIT_BAD_INPUT
    write_json(place.images / page.RESULTS, {"facts": {"steps": "3"}, "studies": {"classes": STUDY}})
    assert main([*from_results, "--dry_run"]) == EXIT_BAD_INPUT and not place.page.exists()
    assert main(from_results) == EXIT_OK
    text = place.page.read_text(encoding="utf-8")
    assert "| steps | 3 |" in text and "| Likeness | Cosine" in text and "| KID |" not in text
    with pytest.raises(UserError, match=r"is not there, so no part of it can be written\. Leave --part out"):
        page.Place(tmp_path / "none", "first").read()


def test_a_page_of_numbers_names_its_figures_and_what_was_learned(tmp_path: Path) -> None:
    gains = {"0": {"1": {"value": 0.3, "margin": 0.05}, "2": {"value": 0.1, "margin": 0.05}}}
    study = {**STUDY, "gains": gains}
    results = {"facts": {"steps": "300"}, "studies": {"concept": study}}
    for name in ("concept_numbers.svg", "concept_gradients.svg", "classes_loss.svg"):
        (tmp_path / name).touch()
    study["gradients"] = {"conflict": {"1": {"20": 0.2, "40": 0.4}, "2": {"20": 0.1}, "3": {}}}
    text = page.results_text(results, tmp_path, "images/x")
    shown, folded = text.partition("<summary>More figures</summary>")[::2]
    assert "(images/x/concept_numbers.svg)" in shown and "(images/x/concept_gradients.svg)" in folded
    assert "classes_loss" not in text and "<summary>Each arm" not in text, "figures of another study, one arm"
    assert "losses, conflict: +0.200 ± 1.271 (mean of the seeds; each is the mean of 1 to 2 measurements" in text
    assert "Beyond 3 times its spread: 1 of 2 runs." in text


def test_arms_of_a_seed_differ_in_lambda_and_folder_alone() -> None:
    folders = Folders(Path("out"))
    with_, without = make_runs(["classes"], ["0", "0.5"], [7])
    assert (with_.arm.coefficient, without.arm.coefficient) == (0.5, 0.0)
    words = [train_command(run, Settings(), folders) for run in (with_, without)]
    assert [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]] == [
        ("0.5", "0"),
        ("out/classes/lambda0.5_seed7", "out/classes/lambda0_seed7"),
    ]


def test_a_subject_without_alignment_is_plain_kohya() -> None:
    words = train_command(Run("concept", Arm("", 0.0), 1), Settings(), Folders(Path("out")))
    assert not [word for word in words if "align" in word or "dino" in word]


@pytest.mark.parametrize(
    ("arms", "seeds", "said"),
    [
        (["0.5"], [1], "must name 0"),
        (["0", "0.0"], [1], "must name 0"),
        (["0", "0.5"], [1, 1], "each once"),
        (["0", "-1"], [1], "a lambda of 0 or more, one of trd"),
        (["0", "tdr"], [1], "got 'tdr'"),
        (["0", "trd:0"], [1], "got 'trd:0'"),
    ],
)
def test_nothing_to_compare_is_refused(arms: list[str], seeds: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_runs(["classes"], arms, seeds)


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_scripts_take_the_options_of_every_recipe(recipe: str, tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    for study in ("classes", "concept"):
        (folders.pictures(study) / "train").mkdir(parents=True)
    for name in ("train.csv", "val.csv", "class_names.json"):
        (folders.pictures("classes") / name).write_text("{}")
    words = {"prog": "", "description": ""}
    of_repa = train_command(Run("classes", Arm(recipe, 0.1), 1), Settings(), folders)[2:]
    of_network = train_command(Run("concept", Arm(recipe, 0.1), 1), Settings(), folders)[2:]
    for options in (parse_repa_options(of_repa, **words), parse_network_options(of_network, **words)):
        assert options.alignment.align_coeff == 0.1 and options.alignment.alignment


def test_the_control_trains_all_of_an_untrained_u_net_and_draws_from_every_state() -> None:
    with_, without = make_runs(["scratch"], ["0", "0.5"], [7])
    words = train_command(with_, Settings(), Folders(Path("out")))
    assert words[words.index("--pretrained_model_name_or_path") + 1] == "out/scratch/untrained"
    assert {"down_blocks", "mid_block", "up_blocks"} <= set(words)
    assert int(words[words.index("--save_last_n_states") + 1]) > 100
    assert len(words) == len(train_command(without, Settings(), Folders(Path("out"))))


def test_states_of_an_interruption_are_no_milestones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quarter of the steps, also where they are no multiple of it, and never the last, which is measured as the run."""
    from tools.alignment_study import measure

    (run, _), folders = make_runs(["scratch"], ["0", "0.5"], [1]), Folders(tmp_path)
    for states, wanted in (([250, 333, 500, 750, 1000], [250, 500, 750]), ([6, 12, 18, 24, 27], [6, 12, 18, 24])):
        monkeypatch.setattr(
            measure, "list_states", lambda folder, states=states: [(step, Path("x")) for step in states]
        )
        assert [step for step, _ in measure.milestones(run, folders)] == wanted
    assert measure.milestones(Run("classes", run.arm, 1), folders) == []


def test_times_are_of_the_steps_after_the_first_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(command: list[str], log: Path, jobs: int) -> None:
        rows = [
            {"step": 10, "time/step_ms": 900.0},
            {"step": 20, "time/step_ms": 500.0, "time/other_s": 3.0},
            {"step": 20},
        ]
        output = Path(command[command.index("--output_dir") + 1])
        (output / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    said: list[str] = []
    monkeypatch.setattr(training, "call", called)
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    runs = make_runs(["classes", "concept"], ["0", "0.5"], [1, 2, 3])
    training.say_times(runs, Settings(steps=400, concept_steps=100), Folders(tmp_path), 2)
    assert "time       classes, lambda 0.5: 0.5 s a step, 4 min a run, 3 to train" in said
    assert "time       concept, lambda 0: 0.5 s a step, 50 s a run, 3 to train" in said
    assert said[-1] == "time       all trainings: at least 14 min, 2 at once; measuring comes after"
    assert not list((tmp_path / "classes").glob("timed_*"))


def test_what_cannot_be_prepared_leaves_the_folder_unclaimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise UserError("no pictures")

    monkeypatch.setattr(claim, "_weights", lambda of: "as they were")
    with pytest.raises(UserError, match="no pictures"):
        claim.claim_folder(Folders(tmp_path), Settings(), refused)
    assert not list(tmp_path.iterdir())


def test_an_arm_is_read_back_as_it_is_written() -> None:
    for text in ("0", "0.1", "trd", "irepa:0.1"):
        assert str(Arm.parse(text)) == text
    assert Arm.parse("trd:0.5") == Arm.parse("trd") != Arm.parse("0.5")


def test_a_difference_that_holds_alone_may_not_hold_among_many() -> None:
    """Holm by hand: 0.001 is below 0.05 / 3, 0.03 not below 0.05 / 2, and then 0.04 falls too."""
    from scipy.stats import t

    def with_p_value(p: float) -> list[Compared]:
        return [Compared("loss", Estimate(float(t.isf(p / 2, 4)), 1.0, 4), 5, 5)]

    arms = {"a": with_p_value(0.03), "b": with_p_value(0.001), "c": with_p_value(0.04)}
    assert significant_among(arms) == {"a": set(), "b": {"loss"}, "c": set()}
    assert significant_among({"a": arms["a"]}) == {"a": {"loss"}}
    one_seed = [Compared("loss", mean_of_seeds([0.1]), 1, 1)]
    assert significant_among({"one": one_seed, "b": arms["b"]}) == {"one": set(), "b": {"loss"}}
    assert significant_among({"a": arms["a"], "d": with_p_value(0.02)}) == {"a": {"loss"}, "d": {"loss"}}


def test_the_p_value_is_that_of_a_paired_test() -> None:
    from scipy.stats import ttest_1samp

    gaps = [0.3, 0.1, 0.25, -0.02]
    assert Compared("loss", mean_of_seeds(gaps), 1, 4).p_value == pytest.approx(ttest_1samp(gaps, 0).pvalue)


def test_the_table_of_all_arms_marks_what_is_left_and_says_so() -> None:
    noise = {
        seed: {name: value + 0.1 * seed * (-1) ** seed for name, value in one.items()} for seed, one in WITH.items()
    }
    lines = overview(WITHOUT, {"λ = 0.5": WITH, "trd": noise})
    row = next(line for line in lines if line.startswith("| Likeness"))
    assert row.count("**") == 2 and "| **+0.0100" in row
    assert lines[-1].endswith("λ = 0.5: 1 better.") and "its 2 arms (Holm)" in lines[-1]


def test_a_folder_keeps_to_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_weights", lambda of: "as they were")
    claim.claim_folder(Folders(tmp_path), Settings(steps=40))
    claim.claim_folder(Folders(tmp_path), Settings(steps=40))
    with pytest.raises(UserError, match=r"steps 40 is now 50\. Name another --out"):
        claim.claim_folder(Folders(tmp_path), Settings(steps=50))
    with pytest.raises(UserError, match="steps 40 is now 50"):  # before a teacher is trained for minutes
        claim.claim_folder(Folders(tmp_path), Settings(steps=50), lambda: pytest.fail("was trained"))
    monkeypatch.setattr(claim, "_weights", lambda of: "trained anew")
    with pytest.raises(UserError, match="weights as they were is now trained anew"):
        claim.claim_folder(Folders(tmp_path), Settings(steps=40))


def test_a_study_that_is_new_to_a_folder_joins_it_and_one_that_changed_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_weights", lambda of: "as they were")
    monkeypatch.setattr(claim, "STUDIES", ("scratch", "classes"))
    claim.claim_folder(Folders(tmp_path), Settings())
    monkeypatch.setattr(claim, "STUDIES", ("scratch", "plain", "classes"))
    claim.claim_folder(Folders(tmp_path), Settings())
    assert "plain" in json.loads((tmp_path / "settings.json").read_text())["commands"]
    monkeypatch.setattr(claim, "train_command", lambda run, *_: ["python", run.study])
    with pytest.raises(UserError, match="the commands that train are others now"):
        claim.claim_folder(Folders(tmp_path), Settings())


def test_a_lora_on_the_pictures_of_the_control_differs_from_it_in_what_is_trained() -> None:
    folders = Folders(Path("out"))
    control, lora = (plan_of(study, Settings(), folders) for study in ("scratch", "plain"))
    assert (control.side, control.batch_size) == (lora.side, lora.batch_size)
    assert lora.base == "tiny-shapes" and "--train_parts" not in lora.words and "--train_parts" in control.words


def test_the_average_reaches_back_over_a_share_of_the_steps() -> None:
    assert ema_decay(400) == 0.95
    assert ema_decay(4) == 0.5
