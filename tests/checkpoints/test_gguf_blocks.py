"""The bytes of GGUF's blocks, against the gguf package: its table of types and its dequantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detent.checkpoints.gguf.blocks import BLOCKS, Block
from detent.checkpoints.quantized import layouts
from detent.checkpoints.records import LayerFormats, ModelFormats
from detent.errors import DetentError
from detent.formats import QTensor, decode, encode

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

_QUANTIZED = [name for name, block in BLOCKS.items() if block.format is not None]
#: Where a block has float16 numbers.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": ()}
_MINIMA = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")


def _random_bytes(block: Block, count: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes that a file can hold: finite float16 numbers, scales that aren't NaN, trits of 0 to 2."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, block.bytes), dtype=np.uint8)
    for at in _HALVES.get(block.name, (0, 2) if block.name in _MINIMA else (0,)):
        data[:, at : at + 2] = random.normal(size=count).astype(np.float16).view(np.uint8).reshape(count, 2)
    if block.name == "MXFP4":
        data[:, 0] = random.integers(0, 250, count)
    if block.name == "NVFP4":
        data[:, :4] = random.integers(0, 127, (count, 4))
    if block.name == "TQ2_0":
        trits = random.integers(0, 3, (count, 4, 64), dtype=np.uint8)
        data[:, :64] = trits[:, 0] | trits[:, 1] << 2 | trits[:, 2] << 4 | trits[:, 3] << 6
    if block.name == "TQ1_0":  # five trits are one of 243 numbers
        numbers = random.integers(0, 243, (count, 48)).astype(np.uint16)
        data[:, :48] = (numbers * 256 + 242) // 243
        data[:, 48:52] = (random.integers(0, 81, (count, 4)).astype(np.uint16) * 3 * 256 + 242) // 243
    return data


def _values(block: Block, data: np.ndarray) -> np.ndarray:
    """What blocks stand for."""
    if block.name != "Q1_0":
        return quants.dequantize(data, gguf.GGMLQuantizationType[block.name])
    signs = np.unpackbits(data[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return signs * data[:, :2].copy().view(np.float16).astype(np.float32)


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_and_sizes_are_those_of_the_gguf_package(name: str) -> None:
    block, kind = BLOCKS[name], gguf.GGMLQuantizationType[name]
    assert block.ggml_type == int(kind)
    assert (block.elements, block.bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", _QUANTIZED)
def test_bytes_decode_to_the_values_of_the_gguf_package(name: str) -> None:
    block = BLOCKS[name]
    data = _random_bytes(block, 24)
    shape = (6, 4 * block.elements)
    q = block.unpack(torch.from_numpy(data), shape)
    assert isinstance(q, QTensor)
    assert np.array_equal(decode(q).numpy().reshape(-1, block.elements), _values(block, data).reshape(24, -1))


@pytest.mark.parametrize("name", _QUANTIZED)
def test_packing_is_the_inverse_of_unpacking(name: str) -> None:
    block = BLOCKS[name]
    data = torch.from_numpy(_random_bytes(block, 24, seed=1))
    if name == "NVFP4":
        data[:, :4].clamp_(min=1)
    shape = (3, 2, 4 * block.elements)
    assert torch.equal(block.pack(block.unpack(data, shape)), data.reshape(6, -1))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers_are_their_bytes(name: str) -> None:
    block, x = BLOCKS[name], torch.randn(3, 5)
    data = block.pack(x)
    assert data.shape == (3, 5 * block.bytes)
    kind = gguf.GGMLQuantizationType[name]
    assert np.array_equal(data.numpy(), quants.quantize(x.numpy(), kind).view(np.uint8).reshape(3, -1))
    assert torch.equal(block.unpack(data, (3, 5)), x.to(block.dtype))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_encoding_survives_the_bytes(name: str) -> None:
    block = BLOCKS[name]
    assert block.format is not None
    q = encode(torch.randn(4, 2 * block.elements), block.format)
    back = block.unpack(block.pack(q), q.shape)
    assert isinstance(back, QTensor)
    assert torch.equal(decode(back), decode(q))


def test_what_a_type_cannot_hold_is_an_error() -> None:
    block = BLOCKS["Q4_K"]
    assert "blocks of 256" in str(block.refusal((4, 96)))
    with pytest.raises(DetentError, match="blocks of 32 along rows, and rows of 48"):
        BLOCKS["Q8_0"].unpack(torch.zeros(34, dtype=torch.uint8), (1, 48))
    with pytest.raises(DetentError, match=r"w: 143 bytes, but Q4_K of shape \(1, 256\) takes 144"):
        block.unpack(torch.zeros(143, dtype=torch.uint8), (1, 256), "w")
    with pytest.raises(DetentError, match="Q4_K is made of codes and scales, not of torch.float32 numbers"):
        block.pack(torch.zeros(1, 256))
    with pytest.raises(DetentError, match="holds uint4 with a minimum"):
        block.pack(encode(torch.zeros(1, 256), BLOCKS["Q8_0"].format))
    damaged = torch.zeros(1, 144, dtype=torch.uint8)
    damaged[0, :2] = torch.tensor([0, 0x7C])  # an infinite float16
    with pytest.raises(DetentError, match="w: outer_scale"):
        block.unpack(damaged, (1, 256), "w")


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "TQ2_0"])
def test_layouts_that_know_nothing_of_it_refuse(name: str) -> None:
    formats = ModelFormats({"m": LayerFormats((64, 512), BLOCKS[name].format)})
    holders = {layout.name for layout in layouts.values() if layout.can_hold(formats) is None}
    assert holders <= {"detent", "gguf"}
    assert "detent" in holders
