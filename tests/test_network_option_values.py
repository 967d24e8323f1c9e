"""Options of train_network.py: configuration files, what cannot be, network_args; the table is in test_network_options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from library.data.dataset_config import read_dataset_config
from library.errors import UserError
from library.options.kohya.network_args import _READ, BlockCurve, NetworkArgs, parse_network_args
from library.options.kohya.refused import REFUSED
from library.options.network import parse_network_options, write_config
from library.options.parser import flatten
from library.options.toml_file import PROJECT_ROOT
from tests.test_network_options import GUIDE_SDXL, config, in_a_shell, parsed

# --- configuration files ---


def test_sections_are_flattened_and_the_later_one_wins(tmp_path: Path) -> None:
    file = config(tmp_path, "seed = 1\n['any name']\nseed = 2\nnetwork_dim = 8\n[other]\nseed = 3\n")
    options = parsed("--config_file", file)
    assert (options.training.seed, options.network.network_dim) == (3, 8)
    assert parsed("--config_file", file.removesuffix(".toml"), "--seed", "4").training.seed == 4


def test_a_flag_that_the_file_sets_can_be_taken_back(tmp_path: Path) -> None:
    file = config(tmp_path, "gradient_checkpointing = true\ncache_latents = true")
    options = parsed("--config_file", file, "--no_gradient_checkpointing", "--no_cache_latents")
    assert not options.speed.gradient_checkpointing and options.cache.cache_latents is False
    assert parsed("--config_file", file).cache.cache_latents is True


def test_the_loose_values_of_other_programs_files_are_read(tmp_path: Path) -> None:
    text = "vae = ''\nresume = 'none'\nnetwork_args = 'conv_dim=4'\ntext_encoder_lr = 1e-5\nresolution = '512,768'\n"
    text += "max_token_length = 75\noptimizer_args = []\nlogging_dir = ''\nbase_weights = []\nlr_warmup_steps = 0\n"
    options = parsed("--config_file", config(tmp_path, text))
    assert options.model.vae is None and options.output.logging_dir is None
    assert options.network.args.conv_dim == 4 and options.optimizer.text_encoder_lr == (1e-5,)
    assert options.data.resolution == (512, 768)


def test_refused_options_at_rest_are_accepted(tmp_path: Path) -> None:
    rest = {
        name: {True: "false", False: '""'}[rule.is_flag] if rule.default in (None, False) else repr(rule.default)
        for name, rule in REFUSED.items()
    }
    file = config(tmp_path, "\n".join(f"{name} = {value}" for name, value in rest.items()).replace("'", '"'))
    assert parsed("--config_file", file).network == parsed().network
    parsed("--zero_stage", "2", "--dynamo_backend=no", "--wandb_api_key", "")


def test_every_refused_option_that_asks_for_something_is_named(tmp_path: Path) -> None:
    for name, rule in REFUSED.items():
        value = "true" if rule.is_flag else "1"
        with pytest.raises(UserError) as caught:
            parsed("--config_file", config(tmp_path, f"\n{name} = {value}"))
        assert f"{name} (my.toml, line 2): {rule.reason}" in str(caught.value)
        with pytest.raises(UserError) as caught:
            parsed(*[f"--{name}"], *([] if rule.is_flag else ["1"]), "--seed", "3")
        assert f"--{name}: {rule.reason}" in str(caught.value)


def test_all_that_is_wrong_with_the_keys_is_said_at_once(tmp_path: Path) -> None:
    file = config(
        tmp_path, "lowram = true\nnetwork_dims = 4\n[notes]\nzebra = 'x'\nv2 = true\n[[datasets]]\nresolution = 1"
    )
    with pytest.raises(UserError) as caught:
        parsed("--config_file", file)
    message = str(caught.value)
    assert "network_dims (did you mean network_dim?) in my.toml, line 2; zebra in my.toml, line 4" in message
    assert "datasets (a file with [[datasets]] is for --dataset_config) in my.toml" in message
    assert "lowram (my.toml, line 1): " in message and "v2 (my.toml, line 5): " in message and "\n" not in message


@pytest.mark.parametrize("where", ["--ignore_unknown_keys", "file"])
def test_unknown_keys_may_be_ignored_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    text = "author_note = 'x'\nseed = 5\n" + ("ignore_unknown_keys = true\n" if where == "file" else "")
    options = parsed("--config_file", config(tmp_path, text), *([where] if where != "file" else []))
    assert options.training.seed == 5
    assert "warning: Unknown key: author_note in my.toml, line 1." in capsys.readouterr().err


def test_a_written_file_gives_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "out"
    options = parsed(
        *in_a_shell(GUIDE_SDXL),
        *("--network_args", "conv_dim=4", "algo=dora", "--text_encoder_lr", "1e-4", "5e-5", "--resolution", "768,512"),
        *("--config_file", str(path), "--output_config", "--max_timestep", "900", "--caption_prefix", 'a "b"'),
    )
    assert write_config(options) == tmp_path / "out.toml"
    again = parsed("--config_file", str(path))
    assert flatten(again) == flatten(options) | {"output_config": False}
    with pytest.raises(UserError, match=r"out.toml is there already"):
        write_config(options)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network_dim = 'eight'", r"network_dim is 'eight' in my.toml, line 1: input should be a valid integer"),
        ("network_dim = 8.5", r"network_dim is 8.5 in my.toml, line 1"),
        ("save_precision = 'half'", r"save_precision is 'half' in my.toml, line 1: input should be 'float', 'fp16' or"),
        ("lr_warmup_steps = '100%'", r"lr_warmup_steps is '100%' in my.toml, line 1: a share must lie between"),
        ("lr_warmup_steps = 'ten'", r"lr_warmup_steps is 'ten' in my.toml, line 1: input should be a valid number"),
        ("seed = true", r"seed is True in my.toml, line 1: input should be a valid integer"),
        ("xformers = 1", r"xformers is 1 in my.toml, line 1: input should be a valid boolean"),
        ("resolution = [512, 512, 512]", r"resolution is \[512, 512, 512\] in my.toml, line 1"),
        ("[a]\nnetwork_args = ['convdim=4']", r"unknown key convdim; did you mean conv_dim\? \(my.toml, line 2\)"),
        ("base_weights = ['nowhere']", r"base_weights nowhere does not exist \(my.toml, line 1\)"),
        ("multires_noise_discount = 0.5", r"has no effect without multires_noise_iterations \(my.toml, line 1\)"),
    ],
)
def test_a_wrong_value_in_a_file_is_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parsed("--config_file", config(tmp_path, text))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seed x", r"invalid literal for int"),
        ("--network_dim x", r"^network_dim is 'x': expected INT\.$"),
        ("--resolution 512,x", r"--resolution: expected SIDE or WIDTH,HEIGHT, got '512,x'"),
        ("--lr_warmup_steps x", r"--lr_warmup_steps: expected STEPS, SHARE or N%, got 'x'"),
        ("--learnin_rate 1", r"Unknown option: --learnin_rate \(did you mean learning_rate\?\)"),
        ("--max_train_steps 0", r"max_train_steps must be positive, got 0"),
        ("--max_train_epochs -1", r"max_train_epochs must be positive, got -1"),
        ("--max_train_epochs 3 --initial_epoch 4", r"initial_epoch 4 leaves nothing to train: max_train_epochs is 3"),
        ("--initial_step 1600", r"initial_step 1600 leaves nothing to train"),
        ("--initial_step 5 --initial_epoch 2", r"initial_step and initial_epoch are both given"),
        ("--initial_step 5 --resume none", r"initial_step has no effect with resume"),
        ("--text_encoder_lr 1 2 3", r"text_encoder_lr has 3 values; SD1.5 has one text encoder and SDXL two"),
        (
            "--network_train_unet_only --text_encoder_lr 1e-5",
            r"text_encoder_lr has no effect with network_train_unet_only",
        ),
        (
            "--network_train_unet_only --network_train_text_encoder_only",
            r"network_train_unet_only and network_train_text_encoder_only exclude each other",
        ),
        ("--unet_lr 0 --text_encoder_lr 0", r"unet_lr and text_encoder_lr leave nothing to train"),
        ("--cache_text_encoder_outputs", r"and they are trained. Add --network_train_unet_only"),
        (
            "--cache_text_encoder_outputs --network_train_unet_only --shuffle_caption",
            r"shuffle_caption changes captions each time",
        ),
        (
            "--cache_text_encoder_outputs_to_disk --text_encoder_lr 0 --caption_dropout_rate 0.1",
            r"caption_dropout_rate changes captions each time",
        ),
        ("--cache_latents --random_crop", r"random_crop needs fresh pixels .* cannot be used with cache_latents"),
        ("--min_timestep 500 --max_timestep 500", r"min_timestep 500 is not below max_timestep 500"),
        ("--max_timestep 1001", r"max_timestep must lie between 1 and 1000, got 1001"),
        ("--adaptive_noise_scale 0.1", r"adaptive_noise_scale has no effect without noise_offset"),
        ("--noise_offset_random_strength", r"noise_offset_random_strength has no effect without noise_offset"),
        ("--huber_c 0.2", r"huber_c has no effect with loss_type l2"),
        ("--scale_v_pred_loss_like_noise_pred", r"is for losses on velocities. Give --v_parameterization too"),
        ("--v_pred_like_loss 0.5 --v_parameterization", r"v_pred_like_loss is for noise models"),
        ("--output_name a/b", r"output_name .* must have no path separators, got 'a/b'"),
        ("--save_model_as ckpt", r"save_model_as ckpt is a pickle, .* Use safetensors"),
        ("--resume nowhere", r"resume nowhere is no folder. It takes auto, none"),
        ("--save_last_n_epochs 2", r"save_last_n_epochs has no effect without save_every_n_epochs"),
        (
            "--network_module lycoris.kohya",
            r"lycoris.kohya is not here. Use networks.lora with --network_args algo=dora, .* or \w+, or conv_dim=N for LoCon",
        ),
        ("--network_module networks.oft", r"Use networks.lora with --network_args algo=oft"),
        (
            "--network_args algo=oft --scale_weight_norms 1",
            r"scale_weight_norms has no effect with algo=oft, which adds nothing to a weight. Use constraint.",
        ),
        ("--dim_from_weights", r"dim_from_weights needs network_weights"),
        ("--base_weights_multiplier 1", r"has 1 numbers, and base_weights names 0 files"),
        ("--full_bf16", r"full_bf16 needs mixed_precision bf16, and it is no"),
        (
            "--fp8_base --base_quantization nf4",
            r"fp8_base and base_quantization nf4 both say how frozen weights are kept",
        ),
        ("--fp8_base_unet --base_quantization fp8", r"fp8_base_unet and base_quantization fp8 both say"),
        ("--base_quantization int4", r"base_quantization"),
        ("--blocks_to_swap -1", r"blocks_to_swap -1 saves nothing: 2 swapped blocks are on the GPU at a time"),
        ("--blocks_to_swap 2", r"blocks_to_swap 2 saves nothing"),
        (
            "--blocks_to_swap 9 --compile regional",
            r"blocks_to_swap moves weights between kernels, which compile regional joins",
        ),
        ("--log_with wandb", r"log_with wandb is not offered: nothing is sent to other machines"),
        ("--sample_every_n_epochs 1", r"sample_every_n_epochs has no effect without sample_prompts"),
        ("--sample_prompts x.md", r"sample_prompts must be a .txt, .toml, .json file, got x.md"),
        ("--dataset_config a.toml --train_data_dir demo", r"train_data_dir has no effect with dataset_config"),
        ("--train_data_dir nowhere", r"train_data_dir nowhere does not exist"),
        ("--pretrained_model_name_or_path x.safetensors", r"nothing to train x.safetensors on. --train_data_dir demo"),
        ("--lr_warmup_steps 10", r"has no effect with the schedule constant. Use constant_with_warmup"),
        ("--masked_loss", r"masked_loss needs masks: conditioning_data_dir or alpha_mask"),
        ("--early_stop 3", r"early_stop has no effect without validation_split"),
        ("--output_config", r"output_config needs config_file, the file to write"),
        ("--align_coeff 0.1", r"align_coeff has no effect without --alignment"),
        ("--dino_model x", r"dino_model has no effect without --alignment"),
        ("--alignment --network_train_text_encoder_only", r"alignment trains features of the U-Net"),
        ("--alignment --dino_resolution 500", r"multiple of the teacher's patch, DINOv2's 14"),
        (
            "--enable_bucket --resolution 1024 --max_bucket_reso 768",
            r"768 is less than the resolution's longer side 1024",
        ),
        ("--config_file nowhere.toml", r"No configuration file nowhere.toml"),
    ],
)
def test_a_wrong_command_is_one_clear_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parsed(*line.split())
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


# --- what the groups say to others ---


def test_sane_defaults_stand_where_kohyas_are_traps() -> None:
    options = parsed()
    assert options.captions.caption_extension is None
    assert [options.data.max_bucket_side(size) for size in ((512, 512), (1024, 1024))] == [1024, 2048]
    assert options.uses_demo
    assert (options.network.rank, options.network.alpha, options.optimizer.learning_rate) == (4, 1.0, 1e-4)
    assert options.training.seed == 42 and not options.alignment.alignment and options.optimizer.ema_decay == 0


def test_zero_is_a_value() -> None:
    options = parsed("--unet_lr", "0", "--network_alpha", "0", "--network_dim", "8")
    assert options.optimizer.unet_rate == 0 and not options.trains_unet and options.network.alpha == 8
    assert not parsed("--text_encoder_lr", "0", "0").trains_text_encoders


def test_rates_of_text_encoders_fit_the_base() -> None:
    optimizer = parsed("--text_encoder_lr", "1e-4", "5e-5").optimizer
    assert optimizer.text_encoder_rates(2) == (1e-4, 5e-5)
    with pytest.raises(UserError, match="has 2 values, and the base has 1 text encoder"):
        optimizer.text_encoder_rates(1)
    assert parsed("--learning_rate", "1").optimizer.text_encoder_rates(2) == (1, 1)


def test_data_sets_inherit_the_data_options() -> None:
    values = parsed("--train_batch_size", "4", "--shuffle_caption", "--resolution", "640").dataset_defaults()
    assert (values["train_batch_size"], values["shuffle_caption"], values["resolution"]) == (4, True, (640, 640))
    assert values["caption_extension"] is None and values["keep_tokens_separator"] is None


# --- network_args ---


def test_network_args_are_typed() -> None:
    args = parse_network_args(
        [
            *("conv_dim=4", "conv_alpha=1", "rank_dropout=0.1", "module_dropout=None", "loraplus_lr_ratio=16"),
            *("down_lr_weight=0,,0.5", "mid_lr_weight=1", "up_lr_weight=cosine+.25", "block_lr_zero_threshold=0.1"),
            *("block_dims=4,0", "block_alphas=1,1", "conv_block_dims=2,2", "conv_block_alphas=1,0.5"),
        ]
    )
    assert (args.conv_dim, args.conv_alpha, args.rank_dropout, args.module_dropout) == (4, 1.0, 0.1, None)
    assert args.down_lr_weight == (0.0, 0.0, 0.5) and args.up_lr_weight == BlockCurve("cosine", 0.25)
    assert (args.block_dims, args.conv_block_alphas) == ((4, 0), (1.0, 0.5)) and args.has_block_learning_rates
    assert parse_network_args(["algo=lokr", "factor=8", "decompose_both=True"]).factor == 8


def test_every_network_arg_can_be_read() -> None:
    assert set(_READ) == {field.name for field in dataclasses.fields(NetworkArgs)}


def test_curves_of_block_weights() -> None:
    assert BlockCurve("linear").weights(3) == (0.0, 0.5, 1.0)
    assert BlockCurve("reverse_linear", 0.5).weights(3) == (1.5, 1.0, 0.5)
    assert BlockCurve("zeros", 1.0).weights(2) == (1.0, 1.0)
    sine, cosine = BlockCurve("sine").weights(9), BlockCurve("cosine").weights(9)
    assert sine == pytest.approx([math.sin(math.pi / 16 * i) for i in range(9)])
    assert cosine == pytest.approx(list(reversed(sine))) and BlockCurve("sine").weights(1) == (0.0,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("conv_dim", r"network_args wants KEY=VALUE, got 'conv_dim'"),
        ("convdim=4", r"unknown key convdim; did you mean conv_dim\?"),
        ("zebra=4", r"unknown key zebra; There are algo, conv_dim"),
        ("conv_dim=4 conv_dim=8", r"has conv_dim twice"),
        ("conv_dim=4.5", r"conv_dim=4.5: expected a whole number"),
        ("conv_dim=0", r"conv_dim must be positive, got 0"),
        ("conv_alpha=1", r"conv_alpha has no effect without conv_dim"),
        ("algo=locon", r"algo=locon: LoCon is algo=lora with conv_dim"),
        ("algo=full", r"algo=full: expected lora, dora, loha, lokr, oft"),
        ("rank_dropout=1", r"rank_dropout must be at least 0 and below 1"),
        ("block_dims=4,4 block_alphas=1", r"block_alphas has 1 numbers, and block_dims has 2"),
        ("up_lr_weight=cosinus", r"expected numbers or one of sine, cosine"),
        ("down_lr_weight=1,x", r"expected numbers or one of sine, cosine"),
        ("block_lr_zero_threshold=0.1", r"has no effect without down_lr_weight"),
        ("factor=4", r"factor has no effect with algo=lora; it belongs to lokr"),
        ("algo=oft loraplus_lr_ratio=4", r"loraplus_lr_ratio has no effect with algo=oft"),
        ("conv_block_alphas=1,1", r"conv_block_alphas has no effect without conv_block_dims"),
        ("loraplus_lr_ratio=nan", r"expected a finite number"),
    ],
)
def test_wrong_network_args_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_network_args(words.split())


@pytest.mark.parametrize(("name", "side"), [("character_sd15", 512), ("character_sdxl", 1024)])
def test_the_shipped_character_configs_say_what_the_guide_does(
    name: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "character" / "images").mkdir(parents=True)
    folder = PROJECT_ROOT / "dataset_configs"
    arguments = ["--dataset_config", f"{folder / name}.toml", "--config_file", f"{folder / 'character.toml'}"]
    options = parse_network_options(
        [*arguments, "--pretrained_model_name_or_path", "tiny-sd15"], prog="train_network.py", description=None
    )
    assert (options.network.rank, options.network.alpha, options.training.max_train_epochs) == (64, 32, 12)
    assert (options.optimizer.unet_rate, options.optimizer.text_encoder_rates(1)) == (3e-4, (2e-4,))
    [dataset] = read_dataset_config(folder / f"{name}.toml", options.dataset_defaults())
    assert (dataset.resolution, dataset.bucket_no_upscale) == ((side, side), True)
