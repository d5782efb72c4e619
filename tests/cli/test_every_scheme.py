"""Every scheme of the guides, and neighbours, from a float checkpoint to one that is read back the same."""

from __future__ import annotations

import pytest

from cli.runner import Workplace
from detent.config import all_schemes, kv_cache_types, scheme_aliases

NEIGHBOURS = (
    "w_int3_per_group_sym",
    "w_uint2_per_group_asym",
    "w_uint5_per_channel_sym",
    "w_fp8_e5m2_per_tensor",
    "w_fp8_e4m3_per_group",
    "w_nf4_per_group",
    "w_mxfp8_e5m2_a_mxfp8_e5m2",
    "w_mx4_a_mx4",
    "w_mx9",
    "w_int4_on_fp8",
    "w_int4_per_group_a_fp8_per_tensor",
)
SCHEMES = [name for name in dict.fromkeys((*all_schemes(neighbours=False), *NEIGHBOURS)) if name != "no_quant"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluates_as_it_was_simulated(scheme: str, place: Workplace) -> None:
    place.quantize(scheme=scheme)
    report = place.report
    assert report["scheme"] == scheme
    assert report["weights"]["quantized"] == 14
    assert report["perplexity"]["before"] > 1
    assert report["size_bytes"]["after"] < report["size_bytes"]["before"]
    assert place.evaluate()["perplexity"] == {"before": None, "after": report["perplexity"]["after"]}


@pytest.mark.parametrize("kv_cache", kv_cache_types())
def test_every_key_value_cache_type(kv_cache: str, place: Workplace) -> None:
    place.quantize("--kv_cache_dtype", kv_cache, scheme="w_int8_per_tensor_sym")
    assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]


def test_the_cache_type_matters(place: Workplace) -> None:
    place.quantize(scheme="w_int8_per_tensor_sym")
    without = place.report["perplexity"]["after"]
    place.quantize("--kv_cache_dtype", "mxfp4", "--overwrite", scheme="w_int8_per_tensor_sym")
    assert place.report["perplexity"]["after"] != without


def test_names_of_today_mean_the_same(place: Workplace) -> None:
    aliases = scheme_aliases()
    place.quantize(scheme="int4_wo_32")
    assert place.report["scheme"] == aliases["int4_wo_32"]
