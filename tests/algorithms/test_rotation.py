"""Rotations against dense float64 matrices, and the identities that let them disappear into weights."""

from __future__ import annotations

import pytest
import torch

from detent.algorithms.rotation import (
    Rotation,
    make_rotation,
    offset_through,
    turn_reader,
    turn_rows,
    turn_writer,
)
from detent.errors import DetentError
from detent.nn.hadamard_matrices import hadamard_matrix

KINDS = [
    {},
    {"random": True, "seed": 3},
    {"keeps_mean": True},
    {"block_size": 4},
    {"block_size": 4, "random": True},
    {"block_size": 12, "keeps_mean": True},
]


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [24, 48, 60])
def test_rotations_are_orthogonal(width: int, kind: dict) -> None:
    r = make_rotation(width, **kind).matrix()
    torch.testing.assert_close(r @ r.T, eye(width), rtol=0, atol=1e-12)


def test_plain_rotation_is_the_hadamard_matrix_after_signs() -> None:
    h = hadamard_matrix(24).double() / 24**0.5
    torch.testing.assert_close(make_rotation(24).matrix(), h)
    rotation = make_rotation(24, random=True, seed=5)
    torch.testing.assert_close(rotation.matrix(), torch.diag(rotation.signs) @ h)


@pytest.mark.parametrize("width", [24, 172, 8 * 47])
def test_layer_norm_commutes_with_rotations_that_keep_the_mean(width: int) -> None:
    rotation = make_rotation(width, keeps_mean=True)
    ones = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix() @ ones, ones)
    assert rotation.matrix().abs().amax() < 0.95  # not the identity
    x = 3 * torch.randn(5, width, dtype=torch.float64) + 7
    normed = torch.nn.functional.layer_norm(x, (width,))
    torch.testing.assert_close(torch.nn.functional.layer_norm(rotation.turn(x), (width,)), rotation.turn(normed))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outliers_are_spread(kind: dict) -> None:
    rotation = make_rotation(48, **kind)
    x = torch.zeros(48, dtype=torch.float64)
    x[5] = 1
    assert rotation.turn(x).abs().amax() <= (0.95 if kind.get("keeps_mean") else rotation.block**-0.5 + 1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_readers_and_writers_cancel(kind: dict) -> None:
    torch.manual_seed(0)
    rotation = make_rotation(24, **kind)
    writer, bias, reader = torch.randn(24, 7).double(), torch.randn(24).double(), torch.randn(5, 24).double()
    gain, x = torch.rand(24).double() + 0.5, torch.randn(9, 7).double()
    stream = x @ turn_writer(writer, rotation).T + turn_writer(bias, rotation, -1)
    rms = stream.pow(2).mean(-1, keepdim=True).sqrt()
    plain = x @ writer.T + bias
    expected = plain / plain.pow(2).mean(-1, keepdim=True).sqrt() * gain @ reader.T
    torch.testing.assert_close(stream / rms @ turn_reader(reader, rotation, gain=gain).T, expected)


def test_matrices_in_other_layouts() -> None:
    """[in, out] as in GPT-2's Conv1D, and fused experts."""
    rotation = make_rotation(12, random=True)
    r, gain = rotation.matrix(), torch.rand(12)
    weight = torch.randn(12, 12)
    torch.testing.assert_close(turn_reader(weight, rotation, 0, gain), r.T @ (gain.double()[:, None] * weight))
    torch.testing.assert_close(turn_writer(weight, rotation, 1), weight.double() @ r)
    experts = torch.randn(3, 12, 12)
    expected = torch.stack([w.double() @ torch.diag(gain.double()) @ r for w in experts])
    torch.testing.assert_close(turn_reader(experts, rotation, -1, gain), expected)
    torch.testing.assert_close(turn_writer(experts, rotation, -2), torch.stack([r.T @ w.double() for w in experts]))
    b = torch.randn(12)
    torch.testing.assert_close(offset_through(weight, b), weight.double() @ b.double())
    torch.testing.assert_close(
        offset_through(experts, b, -2), torch.stack([w.double().T @ b.double() for w in experts])
    )


def test_heads_turn_one_by_one() -> None:
    rotation = make_rotation(4)
    r = rotation.matrix()
    weight = torch.randn(20, 6)
    rows = torch.tensor([8, 9, 10, 11, 16, 17, 18, 19])
    turned = turn_rows(weight, rotation, rows)
    expected = weight.double()
    for start in (8, 16):
        expected = expected.clone()
        expected[start : start + 4] = r.T @ weight[start : start + 4].double()
    torch.testing.assert_close(turned, expected)
    output = torch.randn(5, 8)
    torch.testing.assert_close(turn_reader(output, rotation), output.double() @ torch.block_diag(r, r))
    bias = torch.randn(8)
    torch.testing.assert_close(turn_rows(bias, rotation, torch.arange(8), -1), bias.double() @ torch.block_diag(r, r))


def test_sizes_in_words() -> None:
    assert str(make_rotation(24)) == "24 channels"
    assert str(make_rotation(94)) == "94 channels in blocks of 2"


def test_what_is_refused() -> None:
    with pytest.raises(DetentError, match="no Hadamard matrix exists for a width of 9"):
        make_rotation(9)
    with pytest.raises(DetentError, match="doesn't divide it"):
        make_rotation(24, block_size=16)
    with pytest.raises(DetentError, match="no rotation but a swap keeps the mean"):
        make_rotation(6, keeps_mean=True)
    with pytest.raises(DetentError, match="doesn't consist of runs of 4"):
        Rotation(4, 4, None, False).turn(torch.zeros(2, 6))
