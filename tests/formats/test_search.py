"""Formats of GGUF: the codec's invariants, and scales whose error is that of no worse search."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detent.errors import DetentError
from detent.formats import (
    GGUF_FORMATS,
    Format,
    Integer,
    SearchedScale,
    Table,
    decode,
    encode,
    fake_quantize,
    integer,
    kernels,
    per_channel,
    per_group,
    searched,
)
from detent.formats.gguf import as_gguf
from detent.formats.stored import check_stored

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is no part of the package
from benchmarks.gguf_encode import importance_of, ours, problems, relative_error  # noqa: E402

_SEARCHED = {name: fmt for name, fmt in GGUF_FORMATS.items() if isinstance(fmt.scale, SearchedScale)}

#: Relative squared errors of llama.cpp's quantizer (0c1e570) on the problems below: of plain errors on normal,
#: heavy-tailed and trained weights, then of errors weighed by importance. `benchmarks/gguf_encode.py --record`.
_LLAMA_CPP = {
    "Q4_0": (0.00747962, 0.0162307, 0.00762087, 0.00560064, 0.0143834, 0.00586083),
    "Q4_1": (0.00612078, 0.00993988, 0.00627039, 0.00359253, 0.00627236, 0.00377086),
    "Q5_0": (0.00183561, 0.00413563, 0.00187646, 0.00138992, 0.00358435, 0.00145283),
    "Q5_1": (0.00145391, 0.00234584, 0.00146096, 0.000849072, 0.00153338, 0.000879106),
    "Q8_0": (2.88886e-05, 6.61114e-05, 2.97107e-05, 2.82999e-05, 7.0355e-05, 2.93941e-05),
    "Q2_K": (0.0878108, 0.127398, 0.0890724, 0.0458593, 0.0647261, 0.0467104),
    "Q3_K": (0.0231313, 0.0377525, 0.0231311, 0.0162112, 0.0285759, 0.0165976),
    "Q4_K": (0.00509641, 0.00869643, 0.00520865, 0.00372907, 0.00670439, 0.0039201),
    "Q5_K": (0.0013254, 0.002225, 0.00133563, 0.000991904, 0.00189424, 0.001025),
    "Q6_K": (0.000316963, 0.00063783, 0.000318916, 0.000234826, 0.000555078, 0.000241049),
    "IQ4_NL": (0.00585008, 0.0102219, 0.00592095, 0.00463263, 0.00860279, 0.0047081),
    "IQ4_XS": (0.0059334, 0.0104236, 0.00601607, 0.00474131, 0.00893714, 0.00481682),
    "TQ1_0": (0.656532, 0.66102, 0.666632, 0.649891, 0.657778, 0.668831),
    "TQ2_0": (0.656532, 0.66102, 0.666632, 0.649891, 0.657778, 0.668831),
    "MXFP4": (0.013038, 0.0192366, 0.0132557, 0.0134323, 0.0192335, 0.0132383),
    "NVFP4": (0.0105837, 0.00874709, 0.00906153, 0.0105058, 0.00898392, 0.00919491),
    "Q1_0": (0.359207, 0.565653, 0.366153, 0.360763, 0.566933, 0.367412),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_error_is_not_above_that_of_llama_cpp(name: str, weighted: bool) -> None:
    theirs = _LLAMA_CPP[name][3 * weighted : 3 * weighted + 3]
    for x, error in zip(problems().values(), theirs, strict=True):
        importance = importance_of(x.shape[1]) if weighted else None
        q, _ = ours(name, x, importance)
        # Q1_0 has one best scale, which both find: float16 may round it either way.
        assert relative_error(decode(q), x, importance) <= error * (1.0001 if name == "Q1_0" else 1.0)


@pytest.mark.parametrize("name", GGUF_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 1024), (2, 3, 300), (7,)], ids=str)
def test_simulated_is_encoded_and_decoded(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    fmt = GGUF_FORMATS[name]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    q = check_stored(encode(x, fmt), "x")
    values = decode(q)
    assert torch.equal(fake_quantize(x, fmt), decode(q, dtype))
    assert torch.equal(decode(encode(values, fmt, q.scales)), values)
    if len(shape) > 1:
        assert torch.equal(decode(q.rows(1, 2)), values[1:2])


@pytest.mark.parametrize("name", _SEARCHED)
def test_fast_codes_are_those_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = _SEARCHED[name]
    # Multiples of a coarse step are full of ties.
    x = torch.randint(-40, 40, (24, 512), generator=torch.Generator().manual_seed(2)).float() * 2.0**-7
    fast = encode(x, fmt)
    monkeypatch.setattr(kernels, "_SMALL", 1 << 60)
    slow = encode(x, fmt, fast.scales)
    assert torch.equal(fast.codes, slow.codes)
    assert torch.equal(decode(fast), decode(slow))


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_formats_survive_json(name: str) -> None:
    fmt = GGUF_FORMATS[name]
    assert Format.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


def test_bits_per_element() -> None:
    """llama.cpp's table of bits per weight, blocks of 256 (tests/checkpoints has the bytes)."""
    bits = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "IQ4_XS": 4.25, "Q4_1": 5.0}
    assert {name: GGUF_FORMATS[name].bits_per_element((64, 512)) for name in bits} == bits


def _best_by_brute_force(x: np.ndarray, fmt: Format) -> float:
    """The least squared error of one tile over a fine grid of scales, and minimums where there are some."""
    element = fmt.element
    entries = (
        np.array(element.entries) if isinstance(element, Table) else np.arange(element.minimum, element.maximum + 1)
    )
    least, reach = np.inf, np.abs(x).max()
    for scale in reach / np.abs(entries).max() * np.linspace(0.3, 3.0, 400):
        for sign in (1, -1):
            values = np.abs(x[:, None] - sign * scale * entries).min(1)
            least = min(least, float((values**2).sum()))
    return least


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL", "TQ2_0"])
def test_scale_is_near_the_best_of_a_fine_grid(name: str) -> None:
    fmt = GGUF_FORMATS[name]
    x = torch.randn(12, fmt.granularity.group_size or 0, generator=torch.Generator().manual_seed(3))
    found = (decode(encode(x, fmt)) - x).double().square().sum(1).numpy()
    best = [_best_by_brute_force(row.double().numpy(), fmt) for row in x]
    assert found.sum() <= 1.03 * sum(best)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_a_tile_is_encoded_alike_wherever_it_lies(name: str) -> None:
    fmt = _SEARCHED[name]
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(4))
    whole, threads = encode(x, fmt), torch.get_num_threads()
    part = encode(x[37:101], fmt)
    assert torch.equal(decode(part), decode(whole)[37:101])
    try:
        torch.set_num_threads(2)
        assert torch.equal(decode(encode(x, fmt)), decode(whole))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", _SEARCHED)
def test_extremes(name: str) -> None:
    fmt = _SEARCHED[name]
    zeros = encode(torch.zeros(2, 256), fmt)
    assert torch.equal(decode(zeros), torch.zeros(2, 256))
    for constant in (3.0, -3.0):
        assert torch.allclose(decode(encode(torch.full((2, 256), constant), fmt)).abs(), torch.tensor(3.0), atol=1e-3)
    huge = torch.tensor([[3e38, -3e38] * 128, [1e-30, -1e-38] * 128])
    assert bool(torch.isfinite(decode(check_stored(encode(huge, fmt), "x"))).all())
    assert encode(torch.zeros(0, 256), fmt).codes.shape == (0, 256)
    assert encode(torch.zeros(3, 0), fmt).codes.shape == (3, 0)


def test_columns_that_nobody_needs_are_still_encoded() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(5))
    importance = torch.ones(256)
    importance[64:128] = 0.0
    fmt = GGUF_FORMATS["Q4_K"]
    difference = decode(encode(x, fmt, importance=importance)) - x
    assert float(difference[:, 64:128].square().mean()) < 0.02
    assert torch.equal(
        decode(encode(x, fmt, importance=torch.zeros(256))), decode(encode(x, fmt, importance=torch.ones(256)))
    )


@pytest.mark.parametrize("bad", [torch.ones(255), -torch.ones(256), torch.full((256,), torch.nan)])
def test_importance_that_cannot_be_used_is_an_error(bad: Tensor) -> None:
    with pytest.raises(DetentError, match="importance"):
        encode(torch.randn(2, 256), GGUF_FORMATS["Q4_K"], importance=bad)


def test_importance_belongs_to_searched_scales() -> None:
    with pytest.raises(DetentError, match="an importance is for scales that are searched, not for"):
        encode(torch.randn(2, 256), integer(4, per_group(32)), importance=torch.ones(256))


def test_what_is_no_format_is_an_error() -> None:
    with pytest.raises(DetentError, match="integer of 2 to 8 bits in a super-block"):
        SearchedScale(bits=6)
    with pytest.raises(DetentError, match="super-blocks are made of groups"):
        Format(Integer(4), per_channel(0), SearchedScale(6, tiles=8))
    with pytest.raises(DetentError, match="a minimum is stored under searched scales"):
        Format(Integer(4, signed=False), per_group(32), integer(4).scale, "minimum")
    with pytest.raises(DetentError, match="belong together"):
        Format(Integer(4, signed=False), per_group(32), SearchedScale())
    assert searched(Integer(4), 32) == GGUF_FORMATS["Q4_0"]


def test_what_schemes_become_in_gguf() -> None:
    group = per_group(32)
    assert as_gguf(integer(4, group)) == GGUF_FORMATS["Q4_0"]
    assert as_gguf(integer(4, group, signed=False, symmetric=False)) == GGUF_FORMATS["Q4_1"]
    assert as_gguf(integer(5, group, signed=False, symmetric=False)) == GGUF_FORMATS["Q5_1"]
    assert as_gguf(integer(8, group)) == GGUF_FORMATS["Q8_0"]
    assert as_gguf(integer(8, group, signed=False, symmetric=False)) is None
    assert as_gguf(integer(4, per_group(64))) is None
    for fmt in GGUF_FORMATS.values():
        assert as_gguf(fmt) == fmt
