"""A trained Lyra in front of a U-Net: what CLIP and other encoders say of a text, fused, and decoded to CLIP's states.

The file is train_lyra.py's: safetensors with the weights under networks.lyra's names, `probe.N` (what encoder N said of PROBE when
the file was made), and METADATA_KEY in its metadata. By the probes another encoder, other weights and another layer are noticed,
whatever file or number format the encoder comes in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.files import file_hash
from library.models.conditioning import TextConditioner
from library.models.header import read_metadata
from library.models.language import LanguageModel, load_language
from library.models.language_files import check_language, language_status, locate_language
from library.models.load import TextPart
from library.models.weights import assemble, read_tensors
from library.options.text_fusion import TextFusionOptions
from networks import AdapterError
from networks.families import FAMILIES, Family
from networks.lyra import Lyra, LyraSpec

METADATA_KEY = "lyra"
FORMAT_VERSION = 1
PROBE = "a photo of a small red circle at the top left, and two dogs"
MOST_DIFFERENT = 0.05
"""Size of the difference from the probe, relative to the probe: bfloat16 rounds by some 0.01, another CLIP is 1.4 away."""
_PROBES = "probe."


@dataclass(frozen=True)
class FusedEncoder:
    """One encoder of a fusion. name: the base's component, or the model; kind: its class."""

    name: str
    kind: str
    is_base: bool


@dataclass(frozen=True)
class FusionHeader:
    """What a file says of itself."""

    path: Path
    family: Family
    clip_skip: int
    encoders: tuple[FusedEncoder, ...]
    spec: LyraSpec

    @property
    def others(self) -> list[str]:
        """Names of the encoders beside the base's own."""
        return [encoder.name for encoder in self.encoders if not encoder.is_base]

    def metadata(self) -> dict[str, str]:
        """For the file."""
        described = {
            "format_version": FORMAT_VERSION,
            "family": self.family.key,
            "clip_skip": self.clip_skip,
            "encoders": [asdict(encoder) for encoder in self.encoders],
            "spec": self.spec.to_json(),
        }
        return {METADATA_KEY: json.dumps(described)}


def read_fusion(path: Path) -> FusionHeader:
    """Raises UserError for a file that is no fusion, or is damaged."""
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        raise UserError(
            f"{path} is no text fusion: its metadata has no entry {METADATA_KEY}. train_lyra.py makes them."
        )
    try:
        found: dict[str, Any] = json.loads(text)
        if found["format_version"] != FORMAT_VERSION:
            raise AdapterError(f"it is of format {found['format_version']}, and this program reads {FORMAT_VERSION}")
        encoders = tuple(FusedEncoder(str(e["name"]), str(e["kind"]), bool(e["is_base"])) for e in found["encoders"])
        header = FusionHeader(
            path, FAMILIES[found["family"]], int(found["clip_skip"]), encoders, LyraSpec.from_json(found["spec"])
        )
        own = [encoder.name for encoder in encoders if encoder.is_base]
        if own != list(header.family.text_encoders) or len(encoders) != len(header.spec.widths):
            raise AdapterError("its encoders and its sizes do not belong together")
    except (ValueError, KeyError, TypeError, AttributeError, AdapterError) as error:
        reason = error if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is a damaged text fusion: {reason}. Copy it again, or train it anew.") from None
    return header


def check_fusion(options: TextFusionOptions, family: Family, clip_skip: int) -> None:
    """Raise UserError for a fusion that does not fit the base's family, the layer or the encoders named; nothing is loaded.

    clip_skip: as A1111 counts; it does not matter where the family's layer is fixed.
    """
    path, encoders = options.text_fusion, options.text_fusion_encoders
    if path is None:
        return
    header = read_fusion(path)
    if header.family is not family:
        raise UserError(f"{path} is a text fusion for {header.family.title}, and the base is {family.title}.")
    if family.text_layer is None and header.clip_skip != clip_skip:
        raise UserError(
            f"{path} was trained on the states of clip_skip {header.clip_skip}, and clip_skip is {clip_skip} here. Use "
            f"{header.clip_skip}, or train a fusion with --clip_skip {clip_skip}."
        )
    if encoders and len(encoders) != len(header.others):
        raise UserError(
            f"text_fusion_encoders names {len(encoders)}, and {path} was trained with {len(header.others)} beside the base's own: "
            f"{', '.join(header.others)}. Name them in this order."
        )
    for name, given in zip(header.others, encoders or header.others, strict=True):
        try:
            check_language(given)
        except UserError as error:
            raise UserError(
                f"{path} was trained with the text encoder {name}. {error} --text_fusion_encoders says where it is."
            ) from None


def fusion_status(options: TextFusionOptions) -> str | None:
    """None when no encoder has to be fetched for the fusion, else a sentence saying which."""
    if options.text_fusion is None:
        return None
    places = options.text_fusion_encoders or read_fusion(options.text_fusion).others
    return next(filter(None, map(language_status, places)), None)


def fusion_facts(options: TextFusionOptions) -> dict[str, str]:
    """What a cache of embeddings is to know of the fusion they went through: nothing without one."""
    return {} if options.text_fusion is None else {"text_fusion": file_hash(options.text_fusion)}


class TextFusion:
    """A `library.models.conditioning.Fusion` of a Lyra and the encoders that the base does not have."""

    def __init__(self, lyra: Lyra, others: Sequence[LanguageModel]) -> None:
        self.lyra, self.others = lyra, list(others)

    def ids(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([other.ids(texts) for other in self.others])

    @torch.no_grad()
    def __call__(self, hidden: Sequence[Tensor], ids: Tensor) -> list[Tensor]:
        said = [other.states(own) for other, own in zip(self.others, ids, strict=True)]
        decoded = self.lyra([*(own.float() for own in hidden), *said])
        return [new.to(own.dtype) for new, own in zip(decoded, hidden, strict=False)]


def load_fusion(
    options: TextFusionOptions,
    family: Family,
    parts: Sequence[TextPart],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> TextFusion | None:
    """The fusion that the options name, for a base with these text encoders. dtype: that its other encoders compute in.

    Raises UserError where an encoder is another than the one that the file was trained with.
    """
    path = options.text_fusion
    if path is None:
        return None
    header, tensors = read_fusion(path), read_tensors(path)
    probes = [tensors.pop(f"{_PROBES}{number}", None) for number in range(len(header.encoders))]
    places = options.text_fusion_encoders or header.others
    others = [load_language(locate_language(name), dtype=dtype, device=device) for name in places]
    said = probe_states(family, parts, others, header.clip_skip)
    for encoder, probe, here in zip(header.encoders, probes, said, strict=True):
        _check_probe(path, encoder, probe, here)
    where, remedy = f"The text fusion {path}", "Copy it again, or train it anew."
    lyra = assemble(lambda: Lyra(header.spec), tensors, where, dtype=torch.float32, device=device, remedy=remedy)
    return TextFusion(lyra, others)


@torch.no_grad()
def probe_states(
    family: Family, parts: Sequence[TextPart], others: Sequence[LanguageModel], clip_skip: int
) -> list[Tensor]:
    """What each encoder says of PROBE, [77, width] float32 on the CPU."""
    clip = TextConditioner(family, parts, clip_skip=clip_skip)
    own = clip([PROBE]).states[0].float().cpu()
    said = list(own.split([int(part.model.config.hidden_size) for part in parts], dim=-1))
    for other in others:
        said.append(other.states(other.ids(clip.texts([PROBE])).to(other.model.device))[0].cpu())
    return said


def fusion_tensors(lyra: Lyra, probes: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds; the probes in float16."""
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in lyra.state_dict().items()}
    return weights | {f"{_PROBES}{number}": probe.half().contiguous() for number, probe in enumerate(probes)}


def _check_probe(path: Path, encoder: FusedEncoder, probe: Tensor | None, said: Tensor) -> None:
    whose = f"the base's {encoder.name.replace('_', ' ')}" if encoder.is_base else f"the text encoder {encoder.name}"
    if probe is None or not probe.is_floating_point():
        raise UserError(f"{path} is a damaged text fusion: what {whose} said of the probe is missing. Train it anew.")
    if probe.shape != said.shape:
        raise UserError(
            f"{path} was trained with another encoder: {whose} gave states {probe.shape[-1]} wide there, and {said.shape[-1]} here."
        )
    difference = float((probe.float() - said).norm() / probe.float().norm().clamp(min=1e-6))
    if not difference <= MOST_DIFFERENT:
        raise UserError(
            f"{path} was trained with other weights of {whose}, or another layer of it: what it says of the same words differs "
            f"by {100 * difference:.0f} % of its size. Name the base and encoders that the fusion was trained on, or train another."
        )
