"""One whole optimizer step of every task, on the meta device: nothing in it waits for a GPU, and what it takes is counted.

The engine's own step (`loop.take_step`), at the size of SD1.5 and SDXL where shapes decide, with tiny models for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel

import train_network
from library.models.base_family import family_of
from library.models.frozen import freeze_layers
from library.models.locate import locate_base
from library.options.network import parse_network_options
from library.options.repa import parse_repa_options
from library.options.run import RunOptions
from library.training.meta_step import MetaStep, StepSize, meta_step
from library.training.step_count import META, HostRead, StepCount, gpu_kernels
from networks.families import SD15, SDXL, TEXT_ENCODER, UNET, Family
from networks.network import add_network
from networks.spec import NetworkSpec
from tests.tools.network_runs import NetworkSetting

UNET_ONLY = "--network_train_unet_only --cache_text_encoder_outputs --mixed_precision bf16"
UNET_ALONE = {"network_train_unet_only": "", "cache_text_encoder_outputs": ""}
EVERYTHING = (
    "--ema_decay 0.999 --min_snr_gamma 5 --noise_offset 0.05 --noise_offset_random_strength --adaptive_noise_scale 0.01 "
    "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength --loss_type huber --masked_loss --alpha_mask --masked_loss_renormalize "
    "--debiased_estimation_loss --scale_weight_norms 1 --gradient_accumulation_steps 2"
)
SCALED = "--mixed_precision fp16 --max_token_length 150"
HEADS = "--alignment --taps enc_last mid dec_first --align_film"
MEASURED = "--teacher_norm 0.6 --align_timesteps v --align_gradient_every 1 --align_max_grad_norm 1"


def network_options(words: str, folder: Path) -> RunOptions:
    data = [] if "--teacher_latents" in words else ["--train_data_dir", str(folder)]
    argv = [
        *data,
        "--output_dir",
        str(folder),
        "--pretrained_model_name_or_path",
        "published",
    ]
    return parse_network_options([*argv, *words.split()], prog="", description=None)


def repa_options(words: str, folder: Path) -> RunOptions:
    argv = ["--train_data", str(folder), "--output_dir", str(folder), "--pretrained_model_name_or_path", "published"]
    return parse_repa_options([*argv, *words.split()], prog="", description=None)


def narrow(width: int) -> dict[str, Any]:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    widths = {"block_out_channels": (width, 2 * width), "cross_attention_dim": width, "attention_head_dim": 2}
    return {"down_block_types": down, "up_block_types": up, **widths}


def small(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A U-Net of two blocks and a text encoder of two layers, of SD1.5's kind, for what does not depend on the size."""
    with META:
        unet = UNet2DConditionModel(**narrow(8), layers_per_block=1, norm_num_groups=4)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        models = {UNET: unet, TEXT_ENCODER: CLIPTextModel(CLIPTextConfig(**sizes))}
    return {name: model.to(dtype).requires_grad_(False) for name, model in models.items()}


def built(
    options: RunOptions, family: Family, size: StepSize, context: ExitStack, models: dict[str, Any] | None = None
) -> MetaStep:
    return meta_step(options, None, family, size, context, models)


@pytest.mark.parametrize(
    ("parse", "words", "family", "size"),
    [
        (
            network_options,
            f"--mixed_precision bf16 --flow_model --timestep_sampling bins {EVERYTHING}",
            SD15,
            StepSize(512, 768, 2, masked=True, preserved=True),
        ),
        (repa_options, f"--lora_scope all --ema_decay 0.999 {HEADS}", SD15, StepSize(512, 512, 128, teacher_widths={"a": 1024})),
        (
            network_options,
            f"{SCALED} {HEADS} --align_recipe trd {MEASURED} --flow_mode native --timestep_sampling shift",
            SDXL,
            StepSize(1024, 1024, 4, teacher_widths={"a": 1024}),
        ),
    ],
    ids=["sd15 with text encoder, a bridge by bins", "sd15 with heads", "sdxl, all trained, with heads, in fp16, a native flow"],
)  # fmt: skip
def test_a_step_at_full_size_waits_for_nothing(
    parse: Callable[[str, Path], RunOptions], words: str, family: Family, size: StepSize, tmp_path: Path
) -> None:
    with ExitStack() as context:
        counted = built(parse(words, tmp_path), family, size, context).count()
    assert counted.operations > 1000 and counted.flop > 1e12


@pytest.mark.parametrize(
    "words",
    [
        "--network_module networks.lora --network_args conv_dim=4 --network_dropout 0.1",
        "--network_args algo=lora rank_dropout=0.1 module_dropout=0.1 loraplus_lr_ratio=4",
        "--network_args algo=dora conv_dim=4 module_dropout=0.1",
        "--network_args algo=loha conv_dim=4",
        "--network_args algo=lokr conv_dim=4 module_dropout=0.1 rank_dropout=0.1",
        "--network_args algo=oft conv_dim=4 constraint=0.1",
        "--gradient_checkpointing --full_bf16",
        "--fp8_base --network_train_unet_only",
        "--multires_noise_iterations 6 --loss_type smooth_l1 --huber_schedule exponential --max_grad_norm 0",
        "--v_parameterization --scale_v_pred_loss_like_noise_pred --zero_terminal_snr --max_token_length 150",
        "--optimizer_type SGDNesterov --sdpa --no_channels_last",
        "--base_quantization int8",
        "--base_quantization nf4 --network_train_unet_only",
        "--flow_model",
        "--flow_model --timestep_sampling shift --discrete_flow_shift 2.5 --min_snr_gamma 5",
        "--flow_mode native --weighting_scheme cosmap",
        "--flow_mode native --flow_recipe lune",
        "--flow_model --timestep_sampling bins --discrete_flow_shift 2",
        "--flow_mode native --timestep_sampling bins --flow_shift_by_resolution",
        "--timestep_sampling bins --timestep_bins 20 --timestep_bin_correct none --min_snr_gamma 5 --ema_decay 0.9",
        "--teacher_latents drawn --flow_model --flow_target reflow",
        "--teacher_latents drawn --flow_mode native --flow_target kd --flow_kd_cfg 3 --train_parts time_embedding conv_in conv_out",
        "--alignment --manifold_target latents --token_weight 0 --token_grid 4 --taps down_blocks.0 up_blocks.1 --tap_weights 1 2 "
        "--align_timesteps log_snr --align_window -4 4 --flow_model --align_gradient_every 1 --gradient_accumulation_steps 2",
    ],
)
def test_every_kind_of_adapter_and_loss_waits_for_nothing(words: str, tmp_path: Path) -> None:
    options = network_options(f"--network_dim 4 --mixed_precision bf16 {words}", tmp_path)
    with ExitStack() as context:
        assert built(options, SD15, StepSize(128, 64, 2), context, small()).count().operations


def test_the_loss_scaler_of_fp16_waits_for_nothing(tmp_path: Path) -> None:
    with ExitStack() as context:
        counted = built(
            network_options(SCALED, tmp_path), SD15, StepSize(128, 64, 2), context, small(torch.float16)
        ).count()
    assert counted.launches["_amp_foreach_non_finite_check_and_unscale_"] and counted.launches["_amp_update_scale_"]


@pytest.mark.parametrize("mode", ["sample", "token", "random"])
def test_every_manifold_loss_waits_for_nothing(mode: str, tmp_path: Path) -> None:
    size = StepSize(128, 64, 2, masked=True, preserved=True, teacher_widths={"a": 64})
    options = network_options(f"{UNET_ONLY} {HEADS} --manifold_mode {mode} --manifold_clip 0.1", tmp_path)
    with ExitStack() as context:
        assert built(options, SD15, size, context, small()).count().operations


FAULTS = {
    "item": (lambda x: x * x.sum().item(), "_local_scalar_dense.default reads values"),
    "if": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense.default reads values"),
    "mask": (lambda x: x[x > 0], "index.Tensor reads values"),
    "nonzero": (lambda x: x.flatten()[(x.flatten() > 0).nonzero()], "nonzero.default reads values"),
    "cpu": (lambda x: x.cpu(), "copies from the device to cpu"),
    "of the CPU": (lambda x: x * torch.ones(x.shape), "is given a tensor of another device"),
    "upload": (lambda x: x + torch.ones(x.shape).to(META), "is given a tensor of another device"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_wait_is_refused_by_name(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, said = FAULTS[fault]
    with ExitStack() as context:
        step = built(network_options(UNET_ONLY, tmp_path), SD15, StepSize(64, 64), context, small())
        right = step.task.latents

        def waiting_latents(batch: object) -> torch.Tensor:
            result = right(batch)  # type: ignore[arg-type]
            wait(result)
            return result

        monkeypatch.setattr(step.task, "latents", waiting_latents)
        with pytest.raises(HostRead, match=said) as raised:
            step.count()
    assert "test_step_on_meta.py" in str(raised.value) and "in <lambda>" in str(raised.value)


def test_what_is_counted() -> None:
    a, b = torch.empty(100, 30, device=META), torch.empty(30, 50, device=META)
    with StepCount([a, b, a.view(-1)]) as counter:
        before = counter.live
        product = a @ b
        view = product.t()[1:]
        added = view + 1
        del product, view
        added.addmm_(b.T[1:], a.T)
    assert before == 4 * (3000 + 1500)
    assert counter.launches == {"mm": 1, "add": 1, "addmm_": 1} and counter.operations == 3
    assert counter.flop == 2 * 100 * 30 * (50 + 49)
    assert counter.moved == 4 * 2 * added.numel()
    assert counter.live == before + added.nbytes and counter.peak == before + added.nbytes + 4 * 5000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_a_device_allocates(checkpointing: bool) -> None:
    """Within 10 %, by what torch's profiler saw of the same pass on the CPU."""

    def run(device: str, watched: Callable[[list[torch.Tensor]], Any]) -> Any:
        with torch.device(device):
            unet = UNet2DConditionModel(**narrow(32), layers_per_block=2, norm_num_groups=8)
            latents, step, text = torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, 7, 32)
        network = add_network({UNET: unet}, NetworkSpec(rank=4, text_encoder=False), seed=0)
        freeze_layers(unet.train())
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with watched([*unet.parameters(), latents, step, text]) as watch:
            network.cast_together(torch.float32)
            unet(latents, step, text).sample.square().mean().backward()
        return watch

    with gpu_kernels():
        counted = run("meta", StepCount)
    profiler = run("cpu", lambda _: profile(activities=[ProfilerActivity.CPU], profile_memory=True))
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    assert counted.peak - counted.before == pytest.approx(max(accumulate(sizes)), rel=0.1)


@pytest.mark.parametrize(
    ("setting", "words"), [("network_setting", {}), ("sdxl_setting", {"gradient_checkpointing": ""})]
)
def test_a_plan_forecasts_the_memory_of_a_step(
    setting: str,
    words: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Within 10 % of a step of the run's own optimizer and losses, the workspace apart."""
    monkeypatch.setattr("library.training.forecast.WORKSPACE_BYTES", 0)
    owner: NetworkSetting = request.getfixturevalue(setting)
    argv = owner.argv(tmp_path, mixed_precision="bf16", ema_decay=0.9, **UNET_ALONE, **words)
    assert train_network.main([*argv, "--dry_run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device memory")]
    said = re.search(r"about ([\d.]+) MiB: .* for each of (\d+) pictures of (\d+) x (\d+)", line)
    assert said is not None
    pictures, width, height = map(int, said.groups()[1:])
    options, base = parse_network_options(argv, prog="", description=None), locate_base(str(owner.base))
    with ExitStack() as context:
        size = StepSize(width, height, pictures)
        counted = meta_step(options, base, family_of(base), size, context).count()
    assert float(said[1]) * 2**20 == pytest.approx(counted.peak, rel=0.1)


def test_lists_of_tensors_are_as_many_kernels_as_torch_makes_of_them() -> None:
    weights = [torch.empty(2, device=META) for _ in range(200)]
    with StepCount() as counter:
        torch._foreach_mul_(weights, 2.0)
        torch._foreach_lerp_(weights, weights, 0.1)
    assert counter.launches == {"_foreach_mul_": 2, "_foreach_lerp_": 4}


def test_attention_keeps_no_matrix() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.empty(1, 8, 4096, 40, dtype=dtype, device=META, requires_grad=True)
        with gpu_kernels(), StepCount() as counter:
            torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
        assert counter.peak < 8 * q.nbytes and counter.flop == 4 * 8 * 4096**2 * 40 * (1 + 2.5)
