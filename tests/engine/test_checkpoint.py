"""Simulating, writing and reading back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cli.runner import logits, save_checkpoint
from detent.checkpoints import Source, open_quantized
from detent.config import kv_cache_format, parse_scheme
from detent.errors import DetentError
from detent.model.kv_cache import floor_kv_scales, kv_scales
from detent.plan.plan import Plan, make_plan
from detent.pretrained.loading import load_config, load_model, model_on_meta
from detent.runs.load import load_quantized
from detent.runs.probe import compare_few_blocks
from detent.runs.simulate import Simulation, simulate
from detent.runs.stream import LayerStream
from detent.runs.verify import Expected, check_logits, probe_logits, verify
from detent.runs.write import written

TOKENS = torch.randint(0, 63, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("engine") / "llama")


def simulated(folder: Path, scheme: str, dtype: torch.dtype, kv_cache: str | None = None) -> Any:
    source, config = Source(folder), load_config(folder)
    cache = None if kv_cache is None else kv_cache_format(kv_cache)
    plan = make_plan(source, model_on_meta(config), parse_scheme(scheme), kv_cache=cache)
    model = load_model(source, config, dtype=dtype)
    layers = simulate(model, plan, lambda m: m(input_ids=TOKENS))
    return source, plan, model, layers


def write(out: Path, source: Source, plan: Plan, simulation: Simulation, dtype: torch.dtype) -> Expected:
    """Write what was simulated; what `verify` has to find."""
    with written(out, source, plan, simulation, dtype=dtype, held={}) as folder:
        folder.commit()
        return folder.expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("scheme", "kv_cache"),
    [
        ("w_int4_per_group_sym", None),
        ("w_mx6_a_mx6", None),
        ("w_fp4_a_fp4_scale_fp8", None),
        ("w_int8_a_int8_per_tensor_sym", "fp8"),
        ("w_fp8_a_fp8_o_fp8", "int8_per_token"),
    ],
)
def test_logits_of_the_simulated_model(
    scheme: str, kv_cache: str | None, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    source, plan, model, layers = simulated(folder, scheme, dtype, kv_cache)
    write(tmp_path / "out", source, plan, layers, dtype)
    assert torch.equal(logits(model), logits(load_quantized(tmp_path / "out")))


def test_fused_layers_share_their_outer_scale(folder: Path) -> None:
    _, _, _, simulation = simulated(folder, "w_fp4_scale_fp8", torch.float32)
    layers = simulation.layers
    weights = {name.removeprefix("model.layers.0."): layer.record.weight for name, layer in layers.items()}
    q, k, v, o = (weights[f"self_attn.{n}_proj"].outer_scale for n in "qkvo")
    assert q == k == v != o
    assert weights["mlp.gate_proj"].outer_scale == weights["mlp.up_proj"].outer_scale


def test_floor_of_cache_scales(folder: Path) -> None:
    _, _, model, _ = simulated(folder, "w_int4_per_group_sym", torch.float32, "fp8")
    before = {name: float(key.scale) for name, (key, _) in kv_scales(model).items()}
    floor_kv_scales(model, 0.001)
    least = sorted(before.values())[1]
    floor_kv_scales(model, least)
    after = {name: float(key.scale) for name, (key, _) in kv_scales(model).items()}
    assert after == pytest.approx({name: max(scale, least) for name, scale in before.items()})


class TestVerify:
    """What is read back is compared: a difference in anything is an error."""

    def written(self, folder: Path, out: Path) -> tuple[nn.Module, Source, Expected]:
        """The simulated model, its source, and what `verify` is to find in `out`."""
        source, plan, model, simulation = simulated(folder, "w_fp8_a_fp8", torch.float32, "fp8")
        return model, source, write(out, source, plan, simulation, torch.float32)

    @pytest.mark.parametrize(
        "part",
        ["down_proj.weight", "down_proj.weight_scale", "down_proj.input_scale", "k_scale", "embed_tokens.weight"],
    )
    def test_changed_tensor(self, part: str, folder: Path, tmp_path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        out = tmp_path / "out"
        _, source, expected = self.written(folder, out)
        verify(out, expected, source)
        with safe_open(out / "model.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = next(name for name in tensors if name.endswith(part))
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1
        save_file(tensors, out / "model.safetensors", metadata=metadata)
        with pytest.raises(DetentError, match="differs"):
            verify(out, expected, source)

    def test_logits(self, folder: Path, tmp_path: Path) -> None:
        """A fault that no stored tensor shows: what is loaded computes something else."""
        model, _, _ = self.written(folder, tmp_path / "out")
        wanted, loaded = probe_logits(model), load_quantized(tmp_path / "out")
        check_logits(wanted, probe_logits(loaded))
        loaded.get_parameter("model.norm.weight").mul_(1.01)
        with pytest.raises(DetentError, match=r"its logits differ by 1\.00%"):
            check_logits(wanted, probe_logits(loaded))

    def test_each_tensor_once(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        _, source, expected = self.written(folder, out)
        kept, name = expected.kept, next(iter(expected.formats.layers))
        less = {tensor: digest for tensor, digest in kept.items() if tensor != "model.norm.weight"}
        with pytest.raises(DetentError, match=r"model\.norm\.weight is neither quantized nor kept"):
            verify(out, replace(expected, kept=less), source)
        with pytest.raises(DetentError, match=f"{name}.weight is both quantized and kept"):
            verify(out, replace(expected, kept={**kept, f"{name}.weight": 0}), source)
        with pytest.raises(DetentError, match="extra was kept but is missing"):
            verify(out, replace(expected, kept={**kept, "extra": 0}), source)
        with pytest.raises(DetentError, match="extra was written but is missing"):
            verify(out, replace(expected, digests={**expected.digests, "extra": 0}), source)

    def test_one_layer_of_each_form_is_decoded(self, folder: Path, tmp_path: Path) -> None:
        _, source, expected = self.written(folder, tmp_path / "out")
        assert {record.formats for record in expected.examples} == set(expected.formats.layers.values())
        first = expected.examples[0]
        assert first.weight is not None
        other = replace(first, weight=replace(first.weight, scale=first.weight.scale * 2))
        with pytest.raises(DetentError, match="its weight read back differs"):
            verify(tmp_path / "out", replace(expected, examples=[other]), source)

    def test_failure_leaves_nothing(self, folder: Path, tmp_path: Path) -> None:
        source, plan, _, simulation = simulated(folder, "w_fp8_a_fp8", torch.float32, "fp8")
        with (
            pytest.raises(DetentError, match="differs; nothing was written to .*out"),
            written(tmp_path / "out", source, plan, simulation, dtype=torch.float32, held={}) as out,
            out.examined(),
        ):
            raise DetentError("differs")
        assert list(tmp_path.iterdir()) == []


def test_several_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.runs.write.SHARD_SIZE", 20_000)
    source, plan, model, layers = simulated(folder, "w_mx6", torch.float32)
    write(tmp_path / "out", source, plan, layers, torch.float32)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert set(open_quantized(tmp_path / "out").formats.layers) == set(layers.layers)
    assert torch.equal(logits(model), logits(load_quantized(tmp_path / "out")))


@pytest.mark.parametrize(
    "scheme",
    [
        "w_int4_per_group_asym",
        "w_fp8_per_channel_static_a_fp8_per_token_dynamic",
        "w_mxfp4_a_mxfp8",
        "w_fp4_scale_fp8",
        "w_mx6",
        "w_int4_on_fp8",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_gives_the_bits_that_a_model_gives(scheme: str, dtype: torch.dtype, folder: Path) -> None:
    source, plan, _, simulation = simulated(folder, scheme, dtype)
    assert plan.streams
    stream = LayerStream(source, plan, dtype)
    for name in plan.formats.layers:
        ours, theirs = stream.layer(name), simulation.layer(name)
        assert ours.record.formats == theirs.record.formats
        assert ours.record.weight == theirs.record.weight
        assert ours.relative_error == pytest.approx(theirs.relative_error)


def test_what_needs_data_or_a_model_does_not_stream(folder: Path) -> None:
    for scheme, cache in (("w_fp8_a_fp8", None), ("w_mxfp4", "fp8")):
        _, plan, _, _ = simulated(folder, scheme, torch.float32, cache)
        assert not plan.streams


def test_the_first_blocks_show_a_folder_that_computes_something_else(folder: Path, tmp_path: Path) -> None:
    source, plan, _, simulation = simulated(folder, "w_int8_per_channel_a_int8_per_tensor_sym_dynamic", torch.float32)
    stream, config = LayerStream(source, plan, torch.float32), load_config(folder)
    options = {"dtype": torch.float32, "trust_remote_code": False}
    write(tmp_path / "out", source, plan, simulation, torch.float32)
    out: Any = SimpleNamespace(folder=tmp_path / "out", kept=dict.fromkeys(plan.kept), layout=plan.layout)
    compare_few_blocks(out, source, plan, stream, config, **options)
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in plan.formats.layers if "down_proj" in name) + ".weight"
    with safe_open(weights, "pt") as file:
        save_file(tensors | {first: tensors[first].flip(0).contiguous()}, weights, metadata=file.metadata())
    with pytest.raises(DetentError, match="does not compute what"):
        compare_few_blocks(out, source, plan, stream, config, **options)
    with safe_open(weights, "pt") as file:
        save_file(tensors, weights, metadata=file.metadata())
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert "0.5" in path.read_text()
    with pytest.raises(DetentError, match="does not compute what"):
        compare_few_blocks(out, source, plan, stream, config, **options)


def test_the_first_model_of_the_comparison_is_gone_when_the_second_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan, _, simulation = simulated(folder, "w_int8_per_channel_sym", torch.float32)
    write(tmp_path / "out", source, plan, simulation, torch.float32)
    models: list[nn.Module] = []

    def seen(model: nn.Module) -> torch.Tensor:
        assert all(p.is_meta for before in models for p in before.parameters())
        models.append(model)
        return probe_logits(model)

    monkeypatch.setattr("detent.runs.probe.probe_logits", seen)
    out: Any = SimpleNamespace(folder=tmp_path / "out", kept=dict.fromkeys(plan.kept), layout=plan.layout)
    options: Any = {"dtype": torch.float32, "trust_remote_code": False}
    compare_few_blocks(out, source, plan, LayerStream(source, plan, torch.float32), load_config(folder), **options)
    assert len(models) == 2
