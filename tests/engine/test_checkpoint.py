"""Simulating, writing and reading back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cli.runner import logits, save_checkpoint
from detent.checkpoints import Source, open_quantized
from detent.config import kv_cache_format, parse_scheme
from detent.errors import DetentError
from detent.model.kv_cache import floor_kv_scales, kv_scales
from detent.plan.plan import make_plan
from detent.pretrained.loading import load_config, load_model, model_on_meta
from detent.runs.load import load_quantized
from detent.runs.simulate import simulate
from detent.runs.verify import probe_logits, verify
from detent.runs.write import write

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
    write(tmp_path / "out", source, plan, model, layers, dtype=dtype)
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

    def written(self, folder: Path, out: Path) -> tuple[nn.Module, dict[str, Any]]:
        """The simulated model, and what `verify` is to find in `out`."""
        source, plan, model, simulation = simulated(folder, "w_fp8_a_fp8", torch.float32, "fp8")
        write(out, source, plan, model, simulation, dtype=torch.float32)
        records = {name: layer.record for name, layer in simulation.layers.items()}
        return model, {
            "records": records,
            "kept": dict.fromkeys(plan.kept),
            "source": source,
            "kv": kv_scales(model),
        }

    @pytest.mark.parametrize(
        "part",
        ["down_proj.weight", "down_proj.weight_scale", "down_proj.input_scale", "k_scale", "embed_tokens.weight"],
    )
    def test_changed_tensor(self, part: str, folder: Path, tmp_path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        out = tmp_path / "out"
        _, expected = self.written(folder, out)
        verify(out, **expected)
        with safe_open(out / "model.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = next(name for name in tensors if name.endswith(part))
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1
        save_file(tensors, out / "model.safetensors", metadata=metadata)
        with pytest.raises(DetentError, match="differs"):
            verify(out, **expected)

    def test_logits(self, folder: Path, tmp_path: Path) -> None:
        """A fault that no stored tensor shows: what is loaded computes something else."""
        model, expected = self.written(folder, tmp_path / "out")
        wanted = probe_logits(model)
        verify(tmp_path / "out", **expected, expected_logits=wanted, load=load_quantized)

        def load(path: Path) -> nn.Module:
            loaded = load_quantized(path)
            loaded.get_parameter("model.norm.weight").mul_(1.01)
            return loaded

        with pytest.raises(DetentError, match=r"its logits differ by 1\.00%"):
            verify(tmp_path / "out", **expected, expected_logits=wanted, load=load)

    def test_each_tensor_once(self, folder: Path, tmp_path: Path) -> None:
        _, expected = self.written(folder, tmp_path / "out")
        kept, records = expected["kept"], expected["records"]
        with pytest.raises(DetentError, match=r"model\.norm\.weight is neither quantized nor kept"):
            verify(tmp_path / "out", **{**expected, "kept": {n: None for n in kept if n != "model.norm.weight"}})
        name = next(iter(records))
        with pytest.raises(DetentError, match=f"{name}.weight is both quantized and kept"):
            verify(tmp_path / "out", **{**expected, "kept": {**kept, f"{name}.weight": None}})
        with pytest.raises(DetentError, match="extra was kept and isn't there"):
            verify(tmp_path / "out", **{**expected, "kept": {**kept, "extra": None}})

    def test_failure_leaves_nothing(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def differ(*_: object, **__: object) -> None:
            raise DetentError("differs")

        monkeypatch.setattr("detent.runs.write.verify", differ)
        with pytest.raises(DetentError, match="differs"):
            self.written(folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_several_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detent.runs.write.SHARD_SIZE", 20_000)
    source, plan, model, layers = simulated(folder, "w_mx6", torch.float32)
    write(tmp_path / "out", source, plan, model, layers, dtype=torch.float32)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert set(open_quantized(tmp_path / "out").formats.layers) == set(layers.layers)
    assert torch.equal(logits(model), logits(load_quantized(tmp_path / "out")))
