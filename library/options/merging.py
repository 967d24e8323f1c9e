"""Options of merge_lora.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.options.checks import positive, require
from library.options.dialect import Alias, Dialect, Refused
from library.precision import Precision

KOHYA = Dialect(
    aliases={
        "sd_model": Alias("pretrained_model_name_or_path"),
        "lbws": Alias("block_ratios"),
        "model": Alias("models"),
        "ratio": Alias("ratios"),
    },
    refused={
        "precision": Refused("merging is computed in float32.", "float"),
        "concat": Refused("sums of LoRAs are exact without it, with --lora_only."),
        "shuffle": Refused("the ranks of a sum have no order that matters."),
        "no_metadata": Refused("A1111 hides files by their metadata, and the base is found by it."),
        "device": Refused("LoRAs are summed on the CPU.", None, ("cpu", "cuda")),
        "v2": Refused("models are SD1.5 or SDXL."),
    },
)
"""What kohya's merge_lora.py, sdxl_merge_lora.py, svd_merge_lora.py and resize_lora.py call these options."""


@dataclass(frozen=True)
class MergeLoraOptions:
    models: tuple[Path, ...] = ()
    """Adapters: kohya, diffusers or PEFT files, training states, or one checkpoint with adapters in it. Default: the newest
    training output."""
    ratios: tuple[float, ...] = ()
    """Strength of each adapter: 1 is as trained (the default), 0 leaves the base as it is, -1 takes away."""
    checkpoint: Path | None = None
    """The same as --models with one entry."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, a hub id, one .safetensors file, or tiny-shapes. Default: the one the adapter names."""
    prediction_type: Literal["flow_prediction"] | None = None
    """The base is a flow model, which its files do not say; those that are written say it."""
    output_dir: Path | None = None
    """Diffusers folder to write."""
    save_single_file: bool = False
    """Write model.safetensors in the original layout into output_dir as well, for A1111 and ComfyUI."""
    save_to: Path | None = None
    """Instead of output_dir: the one .safetensors file to write, a checkpoint or with --lora_only a LoRA."""
    lora_only: bool = False
    """Write no model but one LoRA that is the sum of the adapters, for models/Lora of a UI."""
    family: Literal["sd15", "sdxl"] | None = None
    """With --lora_only: what the adapters are for, where their files do not tell; names in the LoRA file depend on it. A base
    says it too."""
    lora_format: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Names in the LoRA file. A1111 and ComfyUI want kohya's."""
    new_rank: int | None = None
    """With --lora_only: reduce to this rank by SVD. Default: exact, ranks add up."""
    new_conv_rank: int | None = None
    """The same for 3x3 convolutions. Default: new_rank."""
    dynamic_method: Literal["sv_ratio", "sv_fro", "sv_cumulative"] | None = None
    """With --new_rank, which is then the most: each module keeps as many singular values as dynamic_param asks for: those of
    1/dynamic_param of the largest (sv_ratio), or its share of their norm (sv_fro) or sum (sv_cumulative)."""
    dynamic_param: float | None = None
    """Of dynamic_method: at least 1 for sv_ratio, above 0 and at most 1 for the others."""
    unet_ratio: float = 1.0
    """Further factor for the U-Net, for all adapters."""
    text_encoder_ratio: float = 1.0
    """Further factor for the text encoders, for all adapters."""
    block_ratios: tuple[str, ...] = ()
    """Further factors by block, one entry per adapter: "IN*=0.5,MID=0", or a list of 12, 17, 20 or 26 numbers, BASE first."""
    use_ema: bool = False
    """Merge the moving average of a training state's weights instead of the weights themselves."""
    save_precision: Precision | None = None
    """Number format of every tensor. Default: a model keeps its base's, a LoRA its adapter's."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How merged weights get into a narrower number format: each to the nearest number, or at random to one of the two
    nearest, which keeps changes that are smaller than their distance, on average."""
    rounding_seed: int = 0
    """Of stochastic rounding: what is random follows from it."""
    network_alpha: float | None = None
    """Alpha of a PEFT file that does not say it."""
    inspect: bool = False
    """Show what is in the adapters and stop."""
    generate: bool = False
    """Draw a test picture with the merged model: a golden retriever, 25 steps, CFG 7.5, seed 42."""
    overwrite: bool = False
    """Replace an earlier output."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        for model in self.chosen:
            require(model.exists(), "models", f"{model} does not exist.")
        count = len(self.chosen)
        for name in ("ratios", "block_ratios"):
            given = len(getattr(self, name))
            require(
                given in (0, max(count, 1)), name, f"wants one entry per adapter, got {given} for {count} in models."
            )
        for name in ("ratios", "unet_ratio", "text_encoder_ratio"):
            value = getattr(self, name)
            for ratio in value if isinstance(value, tuple) else (value,):
                require(-10 <= ratio <= 10, name, f"must lie between -10 and 10, got {ratio}.")
        stochastic = self.rounding == "stochastic"
        require(not (stochastic and self.lora_only), "rounding", "is of merged models; with lora_only there is none.")
        require(stochastic or self.rounding_seed == 0, "rounding_seed", "is for --rounding stochastic.")
        positive("network_alpha", self.network_alpha)
        positive("new_rank", self.new_rank)
        positive("new_conv_rank", self.new_conv_rank)
        require(
            self.checkpoint is None or not self.models, "checkpoint", "is another word for models; give one of the two."
        )
        require(self.output_dir is None or self.save_to is None, "save_to", "and output_dir exclude each other.")
        require(
            self.save_to is None or self.save_to.suffix == ".safetensors",
            "save_to",
            f"must be a .safetensors file, got {self.save_to}.",
        )
        require(
            not (self.save_single_file and (self.save_to or self.lora_only)),
            "save_single_file",
            "adds a file to output_dir; with save_to or lora_only there is only one file anyway.",
        )
        require(
            not (self.lora_only and self.prediction_type),
            "prediction_type",
            "is of the base; with lora_only there is none.",
        )
        for name, default in (("new_rank", None), ("new_conv_rank", None), ("family", None), ("lora_format", "kohya")):
            require(self.lora_only or getattr(self, name) == default, name, "is for --lora_only.")
        require(self.new_conv_rank is None or self.new_rank is not None, "new_conv_rank", "needs new_rank as well.")
        for name in ("dynamic_method", "dynamic_param"):
            given = getattr(self, name) is not None
            require(
                not given or self.new_rank is not None, name, "needs new_rank as well, the most that a module keeps."
            )
        require(
            (self.dynamic_method is None) == (self.dynamic_param is None),
            "dynamic_param",
            "and dynamic_method belong together; give both.",
        )
        require(not (self.lora_only and self.generate), "generate", "needs a model; with lora_only there is none.")
        require(
            self.family is None or self.pretrained_model_name_or_path is None,
            "family",
            "and pretrained_model_name_or_path both say what the adapters are for; give one of the two.",
        )

    @property
    def chosen(self) -> tuple[Path, ...]:
        """The adapters that were named."""
        named = self.models if self.checkpoint is None else (self.checkpoint,)
        return tuple(path.expanduser() for path in named)
