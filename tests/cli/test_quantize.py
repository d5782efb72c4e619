"""`detent quantize` and what it leaves: the report, the checkpoint in other hands, exclusions, tied embeddings."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cli.runner import Workplace, contents, detent, logits, save_checkpoint, small, succeed
from detent.checkpoints import Source
from detent.runs.load import load_quantized


def stored_bytes(folder: Path) -> int:
    """The size of all tensors, from the headers of the files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(end - begin for begin, end in spans)
    return total


def int4_in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """What `w_int4_per_group_sym` makes of a weight, by its definition: scale amax / 7.5, codes -8 to 7."""
    rows = weight.double().reshape(weight.shape[0], -1, group)
    scale = (rows.abs().amax(-1, keepdim=True).float() / 7.5).double()
    return ((rows / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


class TestReport:
    def test_fields_and_values(self, place: Workplace) -> None:
        outcome = place.quantize("--group_size", 32)
        report = place.report
        source = load_file(place.model / "model.safetensors")
        assert report["size_bytes"] == {"before": stored_bytes(place.model), "after": stored_bytes(place.out)}
        weights = report["weights"]
        assert (weights["quantized"], weights["kept"]) == (14, len(source) - 14)
        names = {f"{layer['name']}.weight" for layer in report["layers"]}
        assert names | set(weights["kept_reasons"]) == set(source)
        assert names & set(weights["kept_reasons"]) == set()
        assert weights["quantized_parameters"] == sum(source[name].numel() for name in names)
        assert weights["kept_parameters"] + weights["quantized_parameters"] == sum(t.numel() for t in source.values())
        for layer in report["layers"]:
            weight = source[f"{layer['name']}.weight"].double()
            expected = float((weight - int4_in_groups(weight, 32)).norm() / weight.norm())
            assert layer["relative_error"] == pytest.approx(expected, rel=1e-5)
            assert layer["format"] == "int4 per_group(32), float32 scale"
        assert 0 < report["seconds"] < 600
        assert report["peak_memory_bytes"] > 10 << 20
        assert report["command"][:2] == ["detent", "quantize"]
        assert outcome.err == ""
        for figure in ("before", "after"):
            assert f"{report['perplexity'][figure]:.3f}" in outcome.out

    def test_before_is_that_of_the_float_model(self, place: Workplace) -> None:
        place.quantize()
        float_model = place.evaluate(folder=place.model)
        assert float_model["perplexity"] == {"before": place.report["perplexity"]["before"], "after": None}
        from transformers import AutoModelForCausalLM, AutoTokenizer

        text = "\n\n".join(json.loads(place.evaluation.read_text()))
        ids = AutoTokenizer.from_pretrained(place.model)(text, verbose=False)["input_ids"][:64]
        model = AutoModelForCausalLM.from_pretrained(place.model)
        found = logits(model, [ids])[0, :-1].double().log_softmax(-1)
        nll = -found[torch.arange(63), torch.tensor(ids[1:])].mean()
        assert place.report["perplexity"]["before"] == pytest.approx(math.exp(nll), rel=1e-5)

    def test_evaluation_skipped(self, place: Workplace) -> None:
        shutil.copytree(place.model, place.out.parent / "bare")
        bare = replace(place, model=place.out.parent / "bare")
        for path in bare.model.glob("tokenizer*"):
            path.unlink()
        bare.quantize("--skip_evaluation")  # nothing needs a tokenizer
        assert bare.report["perplexity"] is None


class TestData:
    @pytest.mark.parametrize("scheme", ["w_int4_per_group_sym", "w_mx6", "w_fp4_scale_fp8", "w_mxfp8_a_mxfp8"])
    def test_not_read_where_nothing_needs_it(self, scheme: str, place: Workplace, tmp_path: Path) -> None:
        (tmp_path / "garbage.json").write_text("{")
        place.quantize("--dataset", tmp_path / "garbage.json", scheme=scheme)
        assert place.report["calibration"] is None

    def test_static_activations_need_it(self, place: Workplace, tmp_path: Path) -> None:
        (tmp_path / "garbage.json").write_text("{")
        outcome = place.quantize("--dataset", tmp_path / "garbage.json", scheme="w_fp8_a_fp8", run=detent)
        assert outcome.code == 2
        assert "is not JSON" in outcome.err
        place.quantize(scheme="w_fp8_a_fp8")
        assert place.report["calibration"] == {"source": str(place.calibration), "samples": 4, "tokens": 128}

    @pytest.mark.parametrize("dataset", ["nonsense", "missing.json"])
    def test_misspelled_though_not_needed(self, dataset: str, place: Workplace) -> None:
        outcome = place.quantize("--dataset", dataset, run=detent)
        assert outcome.code == 2
        assert dataset in outcome.err
        assert not place.out.exists()

    def test_builtin_text_when_there_is_no_network(self, place: Workplace) -> None:
        outcome = succeed("evaluate", place.model, "--num_eval_data", 1, "--device", "cpu")
        assert "built-in" in outcome.err
        assert "Note:" in outcome.err


class TestOtherReaders:
    """transformers with the compressed-tensors library, against Detent's simulated model."""

    @pytest.mark.parametrize("scheme", ["w_int4_per_group_sym", "w_uint4_per_channel_sym", "w_int8_per_tensor_sym"])
    def test_weights_alone_bit_for_bit(self, scheme: str, place: Workplace) -> None:
        assert torch.equal(*self.both(place, scheme))

    @pytest.mark.parametrize("scheme", ["w_int8_a_int8_per_tensor_sym", "ptpc_fp8", "w_fp8_a_fp8"])
    def test_activations(self, scheme: str, place: Workplace) -> None:
        ours, theirs = self.both(place, scheme)
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999

    def test_key_value_cache_scales(self, place: Workplace) -> None:
        place.quantize("--kv_cache_dtype", "fp8", "--min_kv_scale", 0.125, scheme="w_fp8_a_fp8")
        with safe_open(place.out / "model.safetensors", "pt") as file:
            scales = {n: file.get_tensor(n) for n in file.keys() if n.endswith(("k_scale", "v_scale"))}  # noqa: SIM118
        assert len(scales) == 4
        assert all(float(scale) >= 0.125 for scale in scales.values())
        config = json.loads((place.out / "config.json").read_text())["quantization_config"]
        assert config["kv_cache_scheme"]["num_bits"] == 8

    def both(self, place: Workplace, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM

        place.quantize("--group_size", 32, scheme=scheme) if "group" in scheme else place.quantize(scheme=scheme)
        theirs = AutoModelForCausalLM.from_pretrained(place.out, dtype=torch.float32)
        return logits(load_quantized(place.out)), logits(theirs)


class TestLayers:
    def names(self, place: Workplace) -> set[str]:
        return {layer["name"] for layer in place.report["layers"]}

    def test_several_exclusions(self, place: Workplace) -> None:
        place.quantize("--exclude-layers", "*.down_proj", "model.layers.0", "--skip-evaluation")
        assert len(self.names(place)) == 7  # six of the second layer and the head, which is no longer left out
        reasons = place.report["weights"]["kept_reasons"]
        assert reasons["model.layers.1.mlp.down_proj.weight"] == "excluded by '*.down_proj'"

    @pytest.mark.parametrize("flag", [["--exclude_layers"], ["--exclude_layers", "--skip_evaluation"]])
    def test_no_exclusion(self, flag: list[str], place: Workplace) -> None:
        place.quantize(*flag)
        assert "lm_head" in self.names(place)

    def test_other_group_sizes(self, place: Workplace) -> None:
        more = ("--group_size_per_layer", "*.down_proj", 32, "--group_size_per_layer", "model.layers.0.*", 16)
        place.quantize("--group_size", 64, *more)
        formats = {layer["name"]: layer["format"].split(",")[0] for layer in place.report["layers"]}
        assert formats["model.layers.0.mlp.down_proj"] == "int4 per_group(16)"
        assert formats["model.layers.1.mlp.down_proj"] == "int4 per_group(32)"
        assert formats["model.layers.1.mlp.up_proj"] == "int4 per_group(64)"
        assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]

    @pytest.mark.parametrize("both_stored", [False, True])
    def test_tied_head_is_quantized_apart(self, both_stored: bool, place: Workplace, tmp_path: Path) -> None:
        tied = replace(place, model=save_checkpoint(tmp_path / "tied", small(tie_word_embeddings=True)))
        if both_stored:
            from safetensors.torch import save_file

            file = tied.model / "model.safetensors"
            tensors = load_file(file)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, file, metadata={"format": "pt"})
        tied.quantize("--exclude_layers")
        assert json.loads((tied.out / "config.json").read_text())["tie_word_embeddings"] is False
        model: Any = load_quantized(tied.out)
        embedding = load_file(tied.model / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        assert not torch.equal(model.lm_head.weight, embedding)
        assert tied.evaluate()["perplexity"]["after"] == tied.report["perplexity"]["after"]

    @pytest.mark.parametrize("data_type", ["float16", "bfloat16", "float32"])
    def test_data_type(self, data_type: str, place: Workplace) -> None:
        place.quantize("--data_type", data_type)
        kept = load_file(place.out / "model.safetensors")["model.embed_tokens.weight"]
        assert str(kept.dtype) == f"torch.{data_type}"
        assert place.evaluate()["perplexity"]["after"] == place.report["perplexity"]["after"]

    def test_dtype_not_in_config(self, place: Workplace, tmp_path: Path) -> None:
        bare = replace(place, model=save_checkpoint(tmp_path / "bare", dtype=torch.bfloat16))
        config = json.loads((bare.model / "config.json").read_text())
        (bare.model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
        bare.quantize(scheme="w_fp8_a_fp8")
        assert json.loads((bare.out / "config.json").read_text())["dtype"] == "bfloat16"
        assert bare.evaluate()["perplexity"]["after"] == bare.report["perplexity"]["after"]


class TestOutput:
    def test_overwrite(self, place: Workplace) -> None:
        place.quantize("--skip_evaluation")
        first = contents(place.out)
        assert place.quantize("--skip_evaluation", run=detent).code == 2
        assert contents(place.out) == first
        place.quantize("--skip_evaluation", "--overwrite", scheme="w_mx6")
        assert place.report["scheme"] == "w_mx6"
        (place.out / "mine.txt").write_text("keep")
        before = contents(place.out)
        assert "mine.txt" in place.quantize("--skip_evaluation", "--overwrite", run=detent).err
        assert contents(place.out) == before

    def test_reload(self, place: Workplace) -> None:
        place.quantize("--model_export", "hf_format", scheme="w_fp8_a_fp8")
        reload = ["--model_reload", "--import_model_dir", place.out, "--import_file_format", "hf_format"]
        rest = ["--model_dir", place.model, "--eval_dataset", place.evaluation, "--num_eval_data", 1]
        outcome = succeed("quantize", *rest, *reload, "--device", "cpu")
        assert f"{place.report['perplexity']['after']:.3f} after" in outcome.out

    def test_skip_quantization(self, place: Workplace) -> None:
        outcome = place.quantize("--skip_quantization", scheme=None)
        assert not place.out.exists()
        assert "before" in outcome.out

    def test_sharded_source(self, place: Workplace, tmp_path: Path) -> None:
        sharded = replace(place, model=save_checkpoint(tmp_path / "sharded", max_shard_size="100KB"))
        assert len(list(sharded.model.glob("model-*.safetensors"))) > 2
        sharded.quantize()
        assert sharded.evaluate()["perplexity"]["after"] == sharded.report["perplexity"]["after"]

    @pytest.mark.slow
    def test_sample_model_without_arguments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        succeed("quantize", "--num_eval_data", 1, "--device", "cpu")
        report = json.loads((tmp_path / "exported_model" / "detent_report.json").read_text())
        assert report["scheme"] == "w_int4_per_group_sym"
        assert report["perplexity"]["before"] < report["perplexity"]["after"] < 2 * report["perplexity"]["before"]


def test_the_report_says_what_was_read_back(place: Workplace) -> None:
    shown = place.quantize("--group_size", 32).out
    found = place.report["verification"]
    assert place.report["layout"] == "compressed-tensors"
    assert found["tensors"] == len(Source(place.out, quantized=True).tensors)
    assert 0 <= found["logit_difference"] < 1e-4
    assert f"{found['tensors']} tensors as written" in " ".join(shown.split())
    skipped = place.quantize("--group_size", 32, "--no_verify", "--overwrite")
    assert place.report["verification"] is None
    assert "was not read back" in skipped.err
