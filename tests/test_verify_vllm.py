"""The table of `make verify-vllm` covers what compressed-tensors holds. Needs no vLLM."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from detent.checkpoints import layouts, wanted_layouts

TOOL = Path(__file__).parents[1] / "tools" / "verify_vllm"


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(TOOL))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOL))


cases, expected = module("cases"), module("expected")


def test_each_format_that_compressed_tensors_holds_has_one_row() -> None:
    names = {case.name for case in cases.held_cases()}
    assert {name: len(expected.rows_of(name)) for name in names} == dict.fromkeys(names, 1)
    used = [row for name in names for row in expected.rows_of(name)]
    assert [row.names for row in expected.TABLE if row not in used] == []


def test_refusals_are_told_with_vllms_words_and_ours() -> None:
    assert all(row.says and row.note for row in expected.TABLE if row.scheme is None)
    assert not any(row.says for row in expected.TABLE if row.scheme is not None)


def test_compressed_tensors_own_schema_accepts_each_configuration() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    for case in cases.held_cases():
        described = layouts["compressed-tensors"].quantization_config(case.formats)
        QuantizationConfig.model_validate(described)


@pytest.mark.parametrize("name", ["w_int4_per_group_asym", "--kv_cache_dtype fp8", "NVFP4_DEFAULT_CFG"])
def test_a_case_can_be_written(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in cases.held_cases() if case.name == name)
    cases.write_source(tmp_path / "source")
    cases.write_case(case, tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_detent_formats_says_of_vllm_is_what_the_table_says() -> None:
    (layout,) = wanted_layouts("compressed-tensors")
    says = {case.name: "vLLM" in layout.needs(case.formats) for case in cases.held_cases()}
    assert says == {name: expected.rows_of(name)[0].scheme is not None for name in says}
