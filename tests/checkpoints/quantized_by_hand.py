"""Float weights as other tools store them quantized: the tensors on disk, and in float64 what they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Stored = tuple[dict[str, Tensor], Tensor]


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Each scale over its block, in float64."""
    for axis, length in enumerate(block):
        scale = scale.double().repeat_interleave(length, axis).narrow(axis, 0, shape[axis])
    return scale


def fp8_blocks(name: str, weight: Tensor, block: tuple[int, int] = (128, 128), end: str = "_scale_inv") -> Stored:
    """As DeepSeek has it: FP8 under one scale for each block of the last two axes, edges cut off."""
    shape = tuple(weight.shape)
    steps = (*[1] * (len(shape) - 2), *block)
    scale = torch.rand([-(-n // b) for n, b in zip(shape, steps, strict=True)]) * 0.01 + 0.002
    scales = spread(scale, shape, steps)
    codes = (weight.double() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}{end}": scale}, codes.double() * scales


def fp8(name: str, weight: Tensor, per: str, kind: torch.dtype = torch.float8_e4m3fn) -> Stored:
    """As compressed-tensors' and other tools have it: one scale for the tensor or each row."""
    rows = len(weight)
    shape = {"tensor": (), "one": (1,), "row": (rows, 1), "row of a vector": (rows,)}[per]
    scale = torch.rand(shape) * 0.01 + 0.002
    column = scale.reshape(-1, 1).double()
    codes = (weight.double() / column).clamp(-448, 448).to(kind)
    return {name: codes, f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": torch.rand(())}, (
        codes.double() * column
    )


def _nibbles(weight: Tensor, scales: Tensor) -> Tensor:
    return ((weight.double() / scales).unsqueeze(-1) - E2M1).abs().argmin(-1)


def _pairs(codes: Tensor) -> Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def nvfp4(name: str, weight: Tensor) -> Stored:
    """As ModelOpt has it."""
    outer, scale = (
        torch.tensor(0.003),
        (torch.rand(len(weight), weight.shape[1] // 16) * 40 + 2).to(torch.float8_e4m3fn),
    )
    scales = (scale.float() * outer).double().repeat_interleave(16, 1)  # the two are multiplied in float32
    codes = _nibbles(weight, scales)
    stored = {name: _pairs(codes), f"{name}_scale": scale, f"{name}_scale_2": outer}
    return stored | {f"{name.removesuffix('weight')}input_scale": torch.rand(())}, E2M1[codes] * scales


def mxfp4(name: str, weight: Tensor) -> Stored:
    """As Quark has it."""
    scale = torch.randint(120, 126, (*weight.shape[:-1], weight.shape[-1] // 32), dtype=torch.uint8)
    scales = (2.0 ** (scale.double() - 127)).repeat_interleave(32, -1)
    codes = _nibbles(weight, scales)
    return {name: _pairs(codes), f"{name}_scale": scale}, E2M1[codes] * scales


def gpt_oss(name: str, weight: Tensor) -> Stored:
    """Experts [expert, in, out], stored [expert, out, blocks, bytes]."""
    stored, values = mxfp4("w", weight.transpose(-1, -2))
    blocks = stored["w"].reshape(*stored["w_scale"].shape, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": stored["w_scale"]}, values.transpose(-1, -2)


def int4_packed(name: str, weight: Tensor, group: int, *, zero: bool = False, order: Tensor | None = None) -> Stored:
    """As compressed-tensors packs integers: code + 8, eight to a word, lowest bits first; zero points along rows.

    `order`: the group of each column.
    """
    module, (rows, columns) = name.removesuffix(".weight"), weight.shape
    scale = torch.rand(rows, columns // group) * 0.05 + 0.02
    points = torch.randint(-8, 8, scale.shape) if zero else torch.zeros(scale.shape, dtype=torch.int64)
    groups = torch.arange(columns) // group if order is None else order
    scales = scale.double()[:, groups]
    codes = (weight.double() / scales + points[:, groups]).round().clamp(-8, 7).long()

    def words(unsigned: Tensor) -> Tensor:
        eight = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % 8)).view(len(unsigned), -1, 8)
        word = (eight << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)

    stored = {f"{module}.weight_packed": words(codes + 8), f"{module}.weight_scale": scale}
    stored[f"{module}.weight_shape"] = torch.tensor([rows, columns])
    if zero:
        stored[f"{module}.weight_zero_point"] = words((points + 8).T.contiguous()).T.contiguous()
    if order is not None:
        stored[f"{module}.weight_g_idx"] = order.to(torch.int32)
    return stored, (codes - points[:, groups]).double() * scales


def save_shards(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], shards: int = 2) -> Path:
    """A folder in which neighbours lie in different files: scales apart from their codes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder
