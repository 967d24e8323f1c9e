"""kohya's options that train_network.py knows and does not offer, each with the reason or what to use instead."""

from __future__ import annotations

from typing import Any

from library.options.dialect import Alias, Refused

ALIASES: dict[str, Alias] = {
    "caption_extention": Alias("caption_extension"),
    "use_8bit_adam": Alias("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": Alias("optimizer_type", "Lion"),
    "torch_compile": Alias("compile", "regional"),
    "flow_matching": Alias("flow_model"),
    "flow_timestep_distribution": Alias("timestep_sampling"),
    "flow_logit_mean": Alias("logit_mean"),
    "flow_logit_std": Alias("logit_std"),
    "flow_uniform_static_ratio": Alias("discrete_flow_shift"),
    "flow_uniform_shift": Alias("flow_shift_by_resolution"),
    "flow_uniform_base_pixels": Alias("flow_base_pixels"),
}
"""kohya's other names for options that are here, and those of its forks for rectified flow."""

_DEEPSPEED = "DeepSpeed shards a model over machines; an adapter fits one device. Start with accelerate launch, and use fp8_base."
_HUB = "Nothing is uploaded. Use hf upload after training."
_LOG = "Messages are plain lines; send them to a file with > train.log 2>&1."
_WANDB = "Nothing is sent to other machines. TensorBoard and metrics.jsonl have every row."
_DDP = "Gradients are averaged in one call here, without torch's DDP wrapper, so it has nothing to set."


def _table(*rows: tuple[str, str, dict[str, Any]]) -> dict[str, Refused]:
    """name -> Refused, of rows (reason, kind of values, {name: default})."""
    table: dict[str, Refused] = {}
    for reason, harmless, defaults in rows:
        values = tuple(harmless.split()) if harmless else ()
        table |= {name: Refused(reason, default, values) for name, default in defaults.items()}
    return table


REFUSED: dict[str, Refused] = _table(
    # (reason, further values that ask for nothing, name -> kohya's default; False is a flag)
    (_LOG, "", {"console_log_level": None, "console_log_file": None, "console_log_simple": False}),
    ("SD1.5 and SDXL are trained here, and told apart by themselves; Stable Diffusion 2 is not.", "", {"v2": False}),
    (
        "The CLIP vocabulary comes with the program; there is nothing to fetch or keep.",
        "",
        {"tokenizer_cache_dir": None},
    ),
    (
        "Only file headers are read at the start, and captions each time: kept information would hide what you edit.",
        "",
        {"cache_info": False},
    ),
    ("--dry_run shows the data sets, buckets and dropped pictures.", "", {"debug_dataset": False}),
    (
        "Caches are recognised by content: checking takes seconds, and trusting a stale one trains on it.",
        "",
        {"skip_cache_check": False},
    ),
    (
        "Code in an option is not run. Describe the data in a --dataset_config.",
        "",
        {"dataset_class": None},
    ),
    (
        _HUB,
        "",
        {
            "huggingface_repo_id": None,
            "huggingface_repo_type": None,
            "huggingface_path_in_repo": None,
            "huggingface_token": None,
            "huggingface_repo_visibility": None,
            "save_state_to_huggingface": False,
            "async_upload": False,
        },
    ),
    (
        "Download the state first (hf download) and give its folder to --resume.",
        "",
        {"resume_from_huggingface": False},
    ),
    ("--sdpa, the default, is faster and needs less memory.", "", {"mem_eff_attn": False}),
    ("--compile regional and --compile whole use inductor.", "no", {"dynamo_backend": "inductor"}),
    (
        "Updates of an adapter are smaller than float16 can add. Use --mixed_precision fp16, or --full_bf16.",
        "",
        {"full_fp16": False},
    ),
    (_DDP, "", {"ddp_gradient_as_bucket_view": False, "ddp_static_graph": False}),
    ("No process waits for a long one here: caches are built by all of them.", "", {"ddp_timeout": None}),
    ("Nothing is sent to other machines, where a run would bear it. Leave it out.", "", {"wandb_run_name": None}),
    (_WANDB, "", {"wandb_api_key": None, "log_tracker_config": None}),
    (
        "Weights are loaded straight in the training format, one model at a time. Leave it out.",
        "",
        {"lowram": False},
    ),
    ("Memory is not given back between steps in any case. Leave it out.", "", {"highvram": False}),
    (
        _DEEPSPEED,
        "none",
        {
            "deepspeed": False,
            "zero_stage": 2,
            "offload_optimizer_device": None,
            "offload_optimizer_nvme_path": None,
            "offload_param_device": None,
            "offload_param_nvme_path": None,
            "zero3_init_flag": False,
            "zero3_save_16bit_model": False,
            "fp16_master_weights_and_gradients": False,
        },
    ),
    (
        "The gradients of an adapter are small; it would save nothing. kohya's own train_network.py ignores it.",
        "",
        {"fused_backward_pass": False},
    ),
    (
        "Captions are trained as plain text: (word:1.3) would be learnt with its brackets. Remove the weights.",
        "",
        {"weighted_captions": False},
    ),
    (
        "kohya's own fails on SD1.5 and SDXL. Use --gradient_checkpointing, and --base_quantization or --blocks_to_swap for more.",
        "",
        {"cpu_offload_checkpointing": False},
    ),
    # No options of kohya's, but often seen beside them: in files of its GUI, or as what people call things.
    (
        "It is the GUI's, and kohya's own script does not read it. Leave it out; max_train_epochs says how many epochs there are.",
        "",
        {"epoch": None},
    ),
    (
        "It is the GUI's, and kohya's own script does not read it. Leave it out; network_train_unet_only trains no text encoder.",
        "",
        {"stop_text_encoder_training": None},
    ),
    (
        "It is the GUI's, and kohya's script does not read it. Leave it out: noise_offset or multires_noise_iterations says it.",
        "Multires",
        {"noise_offset_type": "Original"},
    ),
    ("Use --max_train_epochs.", "", {"epochs": None, "num_train_epochs": None, "num_epochs": None}),
    ("Use --learning_rate.", "", {"lr": None}),
    ("Use --network_dim.", "", {"rank": None, "dim": None, "lora_rank": None}),
    ("Use --network_alpha.", "", {"alpha": None, "lora_alpha": None}),
    (
        "It is an option of kohya's scripts for Flux and SD3. SD1.5 and SDXL are trained here.",
        "",
        {"ae": None, "t5xxl": None, "clip_l": None, "clip_g": None},
    ),
    ("Use --train_batch_size, or batch_size in the file of --dataset_config.", "", {"batch_size": None}),
    (
        "It is an option of image UIs. Use --gradient_checkpointing, --base_quantization and --blocks_to_swap to save memory.",
        "",
        {"lowvram": False, "medvram": False},
    ),
)
"""name -> why it is refused, and at which values it asks for nothing."""
