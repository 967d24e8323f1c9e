"""Fold LoRAs into their base model, for A1111, ComfyUI and diffusers, and prove that the result is right.

    python merge_lora.py                                                   # the newest training output into its own base
    python merge_lora.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output_dir merged --save_single_file
    python merge_lora.py --models a.safetensors --save_to models/Stable-diffusion/mine.safetensors
    python merge_lora.py --models a.safetensors b.safetensors --lora_only --new_rank 16 --save_to both.safetensors

Without --pretrained_model_name_or_path the base is the one the adapters were trained on, as their files name it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import EXIT_OK, UserError, script
from library.options.merging import KOHYA, MergeLoraOptions
from library.options.parser import parse

if TYPE_CHECKING:
    import torch

    from library.merging.layouts import Merging
    from library.merging.merge_report import Ingredient
    from library.merging.write import Output

OUTPUTS = Path("outputs")
TEST_PROMPT, TEST_SEED = "a professional photo of a golden retriever dog", 42
TEST_PICTURE = "test_generation.png"


@dataclass(frozen=True)
class Plan:
    ingredients: list[Ingredient]
    base: str
    why: str
    """Why that base."""
    output: Output


@script
def main(argv: list[str]) -> int:
    options = parse(MergeLoraOptions, argv, prog="merge_lora.py", description=__doc__, dialect=KOHYA)
    if options.inspect:
        inspect(options)
        return EXIT_OK
    plan = build(options)
    print_plan(options, plan)
    if options.dry_run:
        try_out(options, plan)
    else:
        (run_lora_only if options.lora_only else run)(options, plan)
    return EXIT_OK


def build(options: MergeLoraOptions) -> Plan:
    """The adapters, read and checked, the name of the base, and where the result goes."""
    from library.merging.lora_file import check_peft_folder, check_summable
    from library.merging.merge_report import Ingredient
    from library.merging.source import (
        base_model_of,
        check_one_kind,
        family_given,
        newest_output,
        of_one_family,
        read_source,
    )
    from library.merging.strength import Strength, parse_blocks
    from library.merging.write import check_output
    from networks.adapter_alphas import PEFT_CONFIG

    models = options.chosen or (newest_output(OUTPUTS, use_ema=options.use_ema),)
    if not options.chosen:
        print(f"No --models given: taking the newest training output, {models[0]}.", file=sys.stderr)
    sources = [read_source(model, use_ema=options.use_ema, network_alpha=options.network_alpha) for model in models]
    if options.lora_only:
        for source in sources:
            check_summable(source.adapter)
        check_one_kind(sources)
        sources = of_one_family(sources, *family_given(options.family, options.pretrained_model_name_or_path))
    ratios = options.ratios or (1.0,) * len(models)
    blocks = [
        parse_blocks(text, source.adapter.known_family)
        for text, source in zip(options.block_ratios, sources, strict=False)
    ]
    blocks = blocks or [{}] * len(models)
    ingredients = [
        Ingredient(source, Strength(ratio, options.unet_ratio, options.text_encoder_ratio, factors))
        for source, ratio, factors in zip(sources, ratios, blocks, strict=True)
    ]
    if sum(source.is_wrapped for source in sources) and len(sources) > 1:
        raise UserError(f"{sources[0].file} or another holds a whole model. Merge such checkpoints one at a time.")
    base, why = ("", "") if options.lora_only else base_model_of(sources, options.pretrained_model_name_or_path)
    output = output_of(options, sources[0].file)
    files = [source.file for source in sources]
    check_output(output, files)
    if options.lora_only and options.lora_format == "peft":
        check_peft_folder(output.path.parent)
        check_output(replace(output, single_file=output.path.with_name(PEFT_CONFIG)), files)
    return Plan(ingredients, base, why, output)


def output_of(options: MergeLoraOptions, adapter: Path) -> Output:
    """Where the result goes: as the options say, or a folder "merged" (file "merged_lora.safetensors") beside the adapter.

    PEFT's form is a folder of its own, of the file's name without .safetensors.
    """
    from library.merging.write import SINGLE_FILE, Output, followed
    from networks.adapter_alphas import PEFT_WEIGHTS

    # A state lies in the folder of its run.
    run_folder = adapter.parent.parent if (adapter.parent / "state.json").exists() else adapter.parent
    given = None if options.output_dir is None else followed(options.output_dir)
    file = None if options.save_to is None else followed(options.save_to)
    if file is None and options.lora_only:
        file = (given or run_folder) / "merged_lora.safetensors"
    if file is not None and options.lora_format == "peft" and file.name != PEFT_WEIGHTS:
        file = file.with_suffix("") / PEFT_WEIGHTS
    if file is not None:
        return Output(None, file, options.overwrite)
    folder = given or run_folder / "merged"
    return Output(folder, folder / SINGLE_FILE if options.save_single_file else None, options.overwrite)


def print_plan(options: MergeLoraOptions, plan: Plan) -> None:
    for one in plan.ingredients:
        print(f"adapter    {one.source.describe()}")
        if one.source.is_wrapped:
            print(
                f"           with {len(one.source.adapter.frozen)} frozen weights of its own, which take the base's place"
            )
        alphas = {module.alpha for module in one.source.adapter.modules.values()}
        if options.network_alpha is not None and options.network_alpha not in alphas:
            print(f"           its alpha is known, so --network_alpha {options.network_alpha:g} is not taken")
        for note in one.source.adapter.notes:
            print(f"           {note}")
        print(f"ratio      {one.strength.describe()}")
    if plan.base:
        print(f"base       {plan.base} ({plan.why})")
    print(f"precision  {options.save_precision or ('as the adapters' if options.lora_only else 'as the base')}")
    replacing = " (replacing what is there)" if plan.output.overwrite and plan.output.path.exists() else ""
    print(f"output     {plan.output.path}{replacing}{', with model.safetensors' if options.save_single_file else ''}")


def try_out(options: MergeLoraOptions, plan: Plan) -> None:
    """What the merge would stop at: adapters that do not fit their base or each other, a full disk. Of bases, headers are read."""
    from library.merging.lora_file import check_combined
    from library.merging.write import check_space
    from library.models.locate import base_status, check_base

    if options.lora_only:
        check_combined(plan.ingredients, options.lora_format, resized=options.new_rank is not None)
        return
    check_base(plan.base)
    if missing := base_status(plan.base):
        print(f"missing    {missing}")
    else:
        check_space(prepare(options, plan), plan.ingredients, plan.output)


def prepare(options: MergeLoraOptions, plan: Plan) -> Merging:
    """The base, looked into but not read, with a place in it for every module of the adapters."""
    from library.merging.layouts import Merging
    from library.merging.merge import place
    from library.merging.rounding import Rounding
    from library.merging.source import with_frozen_weights
    from library.merging.write import check_output
    from library.models.base_schedule import require_kind
    from library.models.checkpoint import open_checkpoint
    from library.models.locate import locate_base
    from networks.prediction_names import BY_SCHEDULER, FLOW_NAME

    location = locate_base(plan.base)
    if location.note:
        print(location.note)
    base = open_checkpoint(location)
    if options.prediction_type is not None:
        base = replace(base, prediction=BY_SCHEDULER[options.prediction_type])
    for one in plan.ingredients if options.prediction_type is None else ():
        file, is_flow = str(one.source.file), base.prediction is FLOW_NAME
        require_kind(file, one.source.adapter.metadata, plan.base, is_flow, "--prediction_type flow_prediction")
    check_output(plan.output, [location.path, *base.files()])
    for one in plan.ingredients:
        if one.source.is_wrapped:
            base = with_frozen_weights(base, one.source)
    folds = place([(one.source.adapter, one.strength) for one in plan.ingredients], base.shapes, base.family)
    return Merging(base, folds, torch_dtype(options), Rounding(options.rounding == "stochastic", options.rounding_seed))


def run(options: MergeLoraOptions, plan: Plan) -> None:
    from library.files import human_bytes, recover_folders
    from library.merging.write import write_merged

    recover_folders(plan.output.path.parent)  # what a killed merge moved aside is in the way again
    report = write_merged(prepare(options, plan), plan.ingredients, plan.output)
    print(f"\n{report.as_text()}")
    print(f"Wrote {plan.output.path} ({human_bytes(sum(report.outputs.values()))}) in {report.seconds:.1f} s.")
    if options.generate:
        draw_test_picture(plan.output)


def draw_test_picture(output: Output) -> None:
    """The conversion report's test: a model that loads, and a picture to look at."""
    import torch

    from library.device import choose_device
    from library.inference.drawing_model import load_model
    from library.inference.infotext import save_png
    from library.inference.picture_infotext import infotext_of
    from library.inference.picture_request import PictureRequest
    from library.inference.text_to_image import draw, native_size
    from library.models.locate import locate_base

    model = load_model(locate_base(str(output.path)), dtype=torch.float32, device=choose_device(None))
    side = native_size(model)
    request = PictureRequest(TEST_PROMPT, "", steps=25, cfg_scale=7.5, width=side, height=side)
    path = output.path / TEST_PICTURE if output.folder else output.path.with_name(f"{output.path.stem}_{TEST_PICTURE}")
    save_png(draw(model, request, [TEST_SEED])[0], path, infotext_of(request, TEST_SEED, output.path.stem))
    print(f"Drew {path}.")


def run_lora_only(options: MergeLoraOptions, plan: Plan) -> None:
    from library.merging.algebra import DynamicRank
    from library.merging.lora_file import write_combined

    dynamic = None
    if options.dynamic_method is not None and options.dynamic_param is not None:
        dynamic = DynamicRank(options.dynamic_method, options.dynamic_param)
    said = write_combined(
        plan.ingredients,
        plan.output.path,
        form=options.lora_format,
        rank=options.new_rank,
        conv_rank=options.new_conv_rank,
        dynamic=dynamic,
        dtype=torch_dtype(options),
    )
    print(f"\n{said}")


def inspect(options: MergeLoraOptions) -> None:
    from library.merging.inspect import describe
    from library.merging.source import newest_output, read_source

    for model in options.chosen or (newest_output(OUTPUTS, use_ema=options.use_ema),):
        source = read_source(model, use_ema=options.use_ema, network_alpha=options.network_alpha)
        print(describe(source.adapter, source.file))


def torch_dtype(options: MergeLoraOptions) -> torch.dtype | None:
    from library.device import named_dtype

    return None if options.save_precision is None else named_dtype(options.save_precision)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
