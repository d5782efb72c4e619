"""`detent formats` and `detent convert`."""

from __future__ import annotations

from cli.runner import Workplace, detent, succeed
from detent.checkpoints import layouts
from detent.config import all_schemes


def test_matrix() -> None:
    rows = {row["scheme"]: row["formats"] for row in succeed("formats", "--json").json}
    assert list(rows) == [name for name in all_schemes() if name != "no_quant"]
    assert all(list(row) == list(layouts) for row in rows.values())
    int3 = rows["w_int3_per_group_asym"]
    assert int3["compressed-tensors"]["engines"] == {
        "vLLM": "humming-kernels, on CUDA",
        "transformers": "compressed-tensors, with CompressedTensorsConfig(dequantize=True)",
    }
    assert "of the power-of-two formats, only MXFP4" in rows["w_mx9_a_mx9"]["compressed-tensors"]["reason"]
    assert rows["w_mx9_a_mx9"]["detent"]["engines"] == {"detent": "", "transformers": "import detent first"}
    text = succeed("formats").out
    assert "1 vLLM, 2 SGLang, 3 transformers, 4 detent" in text
    assert all(name in text for name in rows)


def test_one_scheme_in_any_spelling() -> None:
    text = succeed("formats", "mx9").out
    assert "Formats of w_mx9_a_mx9" in text
    assert "does not hold it" in text
    assert "[int4 per_group(128), " in succeed("formats", "w_int4_per_group_sym").out  # in the reason of GGUF
    for name, why in (("foo", "unknown scheme 'foo'"), ("no_quant", "quantizes nothing")):
        outcome = detent("formats", name)
        assert (outcome.code, outcome.out) == (2, "")
        assert why in outcome.err


def test_convert(place: Workplace) -> None:
    place.quantize("--skip_evaluation", scheme="w_int4_per_group_sym")
    other = place.out.with_name("other")
    report = succeed("convert", place.out, other, "--format", "detent", "--json").json
    assert report["scheme"] == "compressed-tensors as detent"
    assert report["layout"] == "detent"
    assert report["verification"]["logit_difference"] == 0
    assert "compressed-tensors as detent" in succeed("convert", place.out, other, "--format=detent", "--overwrite").out
    before, after = (succeed("inspect", folder, "--json").json["tensors"] for folder in (place.out, other))
    assert {t["name"]: t["format"] for t in before} == {t["name"]: t["format"] for t in after}


def test_refused(place: Workplace) -> None:
    place.quantize("--skip_evaluation", scheme="w_int4_per_group_sym")
    other = place.out.with_name("other")
    for source, options, why in (
        (place.model, ["--format", "detent"], "is not quantized"),
        (place.out, ["--format", "gguff"], "unknown checkpoint format 'gguff'; known: hf_format, compressed-tensors"),
        (place.out, ["--format", "detent", "--custom_mode", "x"], "unknown custom_mode 'x'"),
        (place.out, ["--format", "detent", "--quant_scheme", "w_int2_per_group_sym"], "aren't; quantize the original"),
        (place.out, ["--format", "detent", "--group_size", "32"], "group_size belongs to a scheme"),
        (place.out.with_name("nowhere"), ["--format", "detent"], "there is no such folder"),
    ):
        outcome = detent("convert", source, other, *options)
        assert (outcome.code, outcome.out) == (2, "")
        assert why in outcome.err
        assert not other.exists()
    outcome = detent("convert", place.out, place.out, "--format", "detent")
    assert outcome.code == 2
    assert "is the source checkpoint itself" in outcome.err
