"""Options: defaults, TOML, command line, and what a user reads when one of them is wrong."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.options.network import TrainNetworkOptions
from library.options.parser import fields_of, flatten, parse
from library.options.repa import PrepareCacheOptions, TrainRepaOptions, parse_repa_options
from library.options.toml_file import PROJECT_ROOT, find_config, read_options


def parsed(*argv: str) -> TrainRepaOptions:
    return parse_repa_options(list(argv), prog="train_repa.py", description="x")


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_track_a_of_the_document() -> None:
    options = parsed("--train_data", "x")
    assert options.training.train_batch_size == 128 and options.training.max_train_epochs == 40
    o = options.optimizer
    assert (o.learning_rate, o.adam_beta1, o.adam_beta2, o.adam_epsilon) == (1e-4, 0.9, 0.999, 1e-8)
    assert (o.weight_decay, o.align_weight_decay, o.lr_warmup_steps, o.lr_scheduler) == (0.0, 0.01, 0.1, "cosine")
    assert (o.max_grad_norm, o.ema_decay) == (1.0, 0.9995)
    a = options.alignment
    assert (a.align_coeff, a.align_warmup_steps, a.manifold_weight, a.manifold_mode) == (0.5, 3000, 3.0, "sample")
    assert options.classes.class_dropout == 0.1 and options.model.mixed_precision == "bf16"
    assert (options.output.validate_every_n_steps, options.output.save_every_n_steps) == (3000, 6000)
    assert options.speed.max_data_loader_n_workers == 8 and options.alignment.dino_resolution == (518,)


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = config(tmp_path, "train_data = 'x'\n[a]\nlearning_rate = 0.5\n[b]\nseed = 7\n")
    options = parsed("--dataset_config", file, "--seed", "8")
    assert (options.optimizer.learning_rate, options.training.seed, options.training.train_batch_size) == (0.5, 8, 128)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--align_recipe trd", {"token_weight": 0.0, "manifold_loss": "l1", "manifold_margin": 0.1, "manifold_weight": 1.0}),
        ("--align_recipe irepa", {"align_head": "conv3x3", "teacher_norm": 0.6, "manifold_weight": 0.0, "token_weight": 1.0}),
        ("--align_recipe irepa --align_head mlp", {"align_head": "mlp", "teacher_norm": 0.6}),
        ("--align_recipe trd --manifold_weight 3", {"manifold_weight": 3.0, "manifold_mode": "token"}),
        ("--dataset_config trackA.toml --align_recipe trd", {"manifold_mode": "token", "token_weight": 0.0}),
        ("--dataset_config trackA.toml --align_recipe irepa --align_head mlp", {"align_head": "mlp", "teacher_norm": 0.6}),
        ("--flow_recipe lune", {"timestep_sampling": "uniform", "discrete_flow_shift": 2.0}),
        ("--flow_recipe lune --discrete_flow_shift 3", {"timestep_sampling": "uniform", "discrete_flow_shift": 3.0}),
        ("--flow_recipe bigasp --weighting_scheme mode", {"timestep_sampling": None, "weighting_scheme": "mode"}),
    ],
)  # fmt: skip
def test_a_recipe_lies_between_the_defaults_and_what_is_given(
    words: str, expected: dict[str, object], tmp_path: Path
) -> None:
    """Given on the command line or in a file, also where it is the default that is given. Nearer to the user, it beats a file."""
    if words.startswith("--dataset_config"):
        options = flatten(parsed(*words.split()))
        assert {name: options[name] for name in expected} == expected
        return
    flat = iter(words.replace("--", "").split())
    pairs = [
        f"{name} = {float(value) if value.isdigit() else json.dumps(value)}"
        for name, value in zip(flat, flat, strict=True)
    ]
    file = config(tmp_path, "\n".join(pairs))
    for argv in (["--train_data", "demo", *words.split()], ["--dataset_config", file]):
        options = flatten(parsed(*argv))
        assert {name: options[name] for name in expected} == expected


def test_hyphens_and_underscores_are_the_same() -> None:
    assert parsed("--train-data", "x", "--learning-rate=0.5", "--no-alignment") == parsed(
        "--train_data", "x", "--learning_rate", "0.5", "--no_alignment"
    )


def test_without_a_config_the_demo_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed().model.pretrained_model_name_or_path == "tiny-shapes"
    assert "using the embedded demo.toml" in capsys.readouterr().err


def test_a_config_is_found_by_its_bare_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("trackA") == PROJECT_ROOT / "dataset_configs" / "trackA.toml"
    (tmp_path / "trackA.toml").write_text("seed = 1")
    assert find_config("trackA.toml") == Path("trackA.toml")


def test_bare_resume_means_the_newest_state() -> None:
    assert parsed("--resume", "--train_data", "x").output.resume == "auto"
    assert parsed("--train_data", "x", "--resume", "none").output.resume == "none"


def test_extends_takes_the_other_file_first(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("train_data = 'x'\nseed = 1\nlearning_rate = 0.5\n")
    options = parsed("--dataset_config", config(tmp_path, "extends = 'base.toml'\n[training]\nseed = 2\n"))
    assert (options.training.seed, options.optimizer.learning_rate) == (2, 0.5)


SHIPPED = sorted((PROJECT_ROOT / "dataset_configs").rglob("*.toml"))
OF_TRAIN_NETWORK = [path for path in SHIPPED if path.stem.startswith("character")]


@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in OF_TRAIN_NETWORK], ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_for_both_scripts(path: Path) -> None:
    parsed("--dataset_config", str(path))
    parse(PrepareCacheOptions, ["--dataset_config", str(path)], prog="x", description="", also_known=[TrainRepaOptions])


def test_every_ablation_of_the_document_changes_what_it_says() -> None:
    base = flatten(parsed("--dataset_config", "trackA.toml"))
    for path in (PROJECT_ROOT / "dataset_configs" / "ablations").glob("*.toml"):
        changed = {k for k, v in flatten(parsed("--dataset_config", str(path))).items() if v != base[k]}
        about = changed - {"dataset_config", "output_dir", "output_name"}
        assert bool(about) == (path.stem != "baseline"), path.stem
        if path.stem.startswith("flow_shift_"):
            flow = parsed("--dataset_config", str(path)).flow
            assert flow.flow_model and flow.shift == float(path.stem.removeprefix("flow_shift_"))


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("lerning_rate = 1", [], r"Unknown key: lerning_rate \(did you mean learning_rate\?\) in my.toml, line 1\."),
        (
            "foo = 1\n[x]\ntap = 2",
            [],
            r"Unknown keys: foo in my.toml, line 1; tap \(did you mean taps\?\) in my.toml, line 3\.",
        ),
        ("[a]\nresolution = 'big'", [], r"resolution is 'big' in my.toml, line 2: invalid literal for int"),
        ("[a]\nconv_dim = '2'", [], r"conv_dim is '2' in my.toml, line 2: input should be a valid integer\."),
        ("alignment = 1", [], r"alignment is 1 in my.toml, line 1: input should be a valid boolean\."),
        (
            "lora_scope = 'up'",
            [],
            r"lora_scope is 'up' in my.toml, line 1: input should be 'mid', 'down_mid' or 'all'\.",
        ),
        ("\nlearning_rate = 0", [], r"learning_rate must be positive, got 0.0 \(my.toml, line 2\)\."),
        ("seed = 1\n[x]\nseed = 2", [], r"seed is given twice: my.toml, line 1 and my.toml, line 3"),
        ("seed = ", [], r"my.toml is not valid TOML: "),
        ("extends = 'nowhere.toml'", [], r"names 'nowhere.toml', which is no file beside it"),
        (
            "dino_resolution = 500",
            [],
            r"multiple of the teacher's patch, .* got 500 \(my.toml, line 1\)",
        ),
        ("", ["--learnin_rate", "3"], r"Unknown option: --learnin_rate \(did you mean learning_rate\?\)\."),
        ("", ["--learning_rate", "fast"], r"could not convert string to float: 'fast'"),
        ("", ["--lora_scope", "up"], r"[Ii]nvalid choice 'up' for argument '--lora_scope'. Expected one of"),
        ("", ["--learning_rate", "-1"], r"^learning_rate must be positive, got -1.0\.$"),
        ("", ["--output_name", "a/b"], r"output_name .* must have no path separators, got 'a/b'"),
        ("", ["--align_schedule", "cutoff"], r"align_cutoff_step is missing, and align_schedule is cutoff"),
        ("", ["--align_cutoff_step", "5"], r"align_cutoff_step has no effect with align_schedule warmup"),
        (
            "",
            ["--v_parameterization", "--raw_v_target"],
            r"raw_v_target is the document's way, --objective v the exact one",
        ),
        ("", ["--network_dropout", "1"], r"network_dropout must be at least 0 and below 1, got 1.0"),
        ("", ["--max_train_samples", "64"], r"train_batch_size 128 is larger than max_train_samples 64"),
        ("", ["--resolution", "500"], r"resolution must be a positive multiple of 64"),
        ("", ["--prompt_template", "a photo"], r"prompt_template must contain \{name\}"),
        ("", ["--taps", "mid", "mid"], r"taps names a tap twice"),
        (
            "",
            ["--flip_aug"],
            r"flip_aug is for captioned pictures \(\[\[datasets\]\], train_data_dir\), not for train_data",
        ),
        ("val_data = 'x'\n[[datasets]]", [], r"val_data is for class pictures, and the pictures have captions"),
        ("", ["--no_network_train_unet_only"], r"network_train_unet_only cannot be off with class pictures"),
        (
            "",
            ["--conv_dim", "4", "--network_args", "conv_dim=2"],
            r"conv_dim and conv_dim in network_args say the same",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(tmp_path: Path, text: str, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parsed("--dataset_config", config(tmp_path, text), *argv)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_file_value_that_the_command_line_mends_is_no_error(tmp_path: Path) -> None:
    file = config(tmp_path, "learning_rate = 0")
    assert parsed("--dataset_config", file, "--learning_rate", "1").optimizer.learning_rate == 1


def test_a_missing_config_names_the_places_and_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No configuration file nope.toml.*demo.toml.*trackA.toml"):
        parsed("--dataset_config", "nope.toml")


def test_a_loop_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("extends = 'b.toml'")
    (tmp_path / "b.toml").write_text("extends = 'a.toml'")
    with pytest.raises(UserError, match="extends itself"):
        read_options(tmp_path / "a.toml")


def test_every_option_has_a_sentence_of_help() -> None:
    documented = set()
    for file in (PROJECT_ROOT / "library" / "options").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            body = node.body if isinstance(node, ast.ClassDef) else []
            for field, following in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                    text = ast.literal_eval(following.value)
                    if isinstance(text, str) and len(text) > 15 and isinstance(field.target, ast.Name):
                        documented.add(field.target.id)
    options = set(fields_of(TrainNetworkOptions) | fields_of(PrepareCacheOptions))
    assert len(options) > 60 and not options - documented
