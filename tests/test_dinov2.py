"""Meta's DINOv2 files against a vision transformer written here from the papers, with plain functions over Meta's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from library.errors import UserError
from library.files import read_json, write_json
from library.models.dinov2 import load_dinov2
from library.models.teachers import teacher_size

WIDTH, LAYERS, HEADS, PATCH, SIDE = 128, 2, 2, 14, 5  # heads are 64 wide in every published size


def meta_weights(*, registers: int, swiglu: bool) -> dict[str, Tensor]:
    """Random tensors under the names and in the shapes of Meta's dinov2_vit*14[_reg4]_pretrain.pth."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3

    weights = {
        "cls_token": normal(1, 1, WIDTH),
        "pos_embed": normal(1, 1 + SIDE**2, WIDTH),
        "mask_token": normal(1, WIDTH),
        "patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": normal(WIDTH),
        "norm.weight": normal(WIDTH),
        "norm.bias": normal(WIDTH),
    }
    if registers:
        weights["register_tokens"] = normal(1, registers, WIDTH)
    # SwiGLU: 2/3 of 4 x width, rounded up to a multiple of 8 (Meta's SwiGLUFFNFused).
    hidden = (int(4 * WIDTH * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * WIDTH
    mlp = (
        {"w12": (2 * hidden, WIDTH), "w3": (WIDTH, hidden)}
        if swiglu
        else {"fc1": (hidden, WIDTH), "fc2": (WIDTH, hidden)}
    )
    for index in range(LAYERS):
        block = f"blocks.{index}."
        linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)} | {
            f"mlp.{n}": s for n, s in mlp.items()
        }
        for name, shape in linears.items():
            weights |= {f"{block}{name}.weight": normal(*shape), f"{block}{name}.bias": normal(shape[0])}
        for name in ("norm1", "norm2"):
            weights |= {f"{block}{name}.weight": normal(WIDTH), f"{block}{name}.bias": normal(WIDTH)}
        weights |= {f"{block}ls1.gamma": normal(WIDTH), f"{block}ls2.gamma": normal(WIDTH)}
    return weights


def meta_forward(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """Every token after the final norm, [B, 1 + registers + h*w, D], at the resolution of the position embedding."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}.qkv").unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        weight = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return linear((weight @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        if f"{name}.w12.weight" in weights:
            gate, value = linear(x, f"{name}.w12").chunk(2, dim=-1)
            return linear(gate * gate.sigmoid() * value, f"{name}.w3")
        hidden = linear(x, f"{name}.fc1")
        return linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.fc2")

    projected = F.conv2d(pictures, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([weights["cls_token"].expand(len(pictures), -1, -1), projected.flatten(2).transpose(1, 2)], dim=1)
    x = x + weights["pos_embed"]
    if "register_tokens" in weights:  # behind CLS, without a position (Darcet et al. 2023)
        x = torch.cat([x[:, :1], weights["register_tokens"].expand(len(pictures), -1, -1), x[:, 1:]], dim=1)
    for index in range(LAYERS):
        block = f"blocks.{index}."
        x = x + attention(norm(x, block + "norm1"), block + "attn") * weights[block + "ls1.gamma"]
        x = x + mlp(norm(x, block + "norm2"), block + "mlp") * weights[block + "ls2.gamma"]
    return norm(x, "norm")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_metas_file_computes_what_metas_architecture_does(tmp_path: Path, registers: int, swiglu: bool) -> None:
    weights = meta_weights(registers=registers, swiglu=swiglu)
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(weights, path)
    model = load_dinov2(str(path), dtype=torch.float64)
    pictures = torch.randn(
        2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    assert teacher_size(str(path))[1:] == (WIDTH, PATCH, LAYERS)
    assert (model(pictures).last_hidden_state - meta_forward(weights, pictures)).abs().max() < 1e-9


def test_metas_tensors_as_safetensors_are_the_same_model(tmp_path: Path) -> None:
    weights = meta_weights(registers=4, swiglu=False)
    torch.save(weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    one, other = (load_dinov2(str(tmp_path / name)).state_dict() for name in ("a.pth", "a.safetensors"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_loads_frozen_in_the_asked_dtype(tiny_dinov2: Path) -> None:
    model = load_dinov2(str(tiny_dinov2), dtype=torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.bfloat16 and teacher_size(str(tiny_dinov2)).width == 64


def test_a_folder_with_registers_keeps_them(tmp_path: Path) -> None:
    torch.save(meta_weights(registers=4, swiglu=False), tmp_path / "a.pth")
    model = load_dinov2(str(tmp_path / "a.pth"))
    model.save_pretrained(tmp_path / "folder")
    again = load_dinov2(str(tmp_path / "folder"))
    assert again.config.num_register_tokens == 4
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_pickle_with_more_than_tensors_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    torch.save({"model": Path("x"), **meta_weights(registers=0, swiglu=False)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth is a pickle with more than tensors .*: python -c"):
        load_dinov2(str(tmp_path / "odd.pth"))


def test_another_checkpoint_is_not_taken_for_a_backbone(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"no DINOv2 backbone of Meta's: pos_embed is missing among 1 tensors"):
        load_dinov2(str(tmp_path / "resnet.pth"))


def test_a_missing_tensor_and_a_torn_file_are_said(tmp_path: Path) -> None:
    weights = meta_weights(registers=0, swiglu=False)
    del weights["blocks.1.ls2.gamma"]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 missing \(first: encoder.layer.1.layer_scale2.lambda1\)"):
        load_dinov2(str(tmp_path / "a.pth"))
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="b.pth cannot be read"):
        load_dinov2(str(tmp_path / "b.pth"))


def test_a_folder_of_another_model_is_named(tiny_dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((tiny_dinov2 / "model.safetensors").read_bytes())
    write_json(tmp_path / "config.json", read_json(tiny_dinov2 / "config.json") | {"model_type": "vit"})
    with pytest.raises(UserError, match="describes a vit"):
        load_dinov2(str(tmp_path))
