"""Weights on their way from a checkpoint into a model without memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.runner import logits, save_checkpoint, small
from detent.checkpoints import Source
from detent.errors import DetentError
from detent.model.skeleton import StreamedWeights, model_without_weights
from detent.pretrained.loading import load_config, load_model
from detent.pretrained.names import CheckpointNames


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_head_of_its_own_in_a_model_said_to_be_tied(factor: float, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", small(tie_word_embeddings=True))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * factor}, file, {"format": "pt"})
    source, config = Source(folder), load_config(folder)
    model = model_without_weights(source, config, dtype=torch.float32)
    weights = StreamedWeights(source, CheckpointNames(model, source.tensors), model)
    weights.put(weights.parameters)
    assert (model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")) == (factor == 1)
    assert torch.equal(logits(model), logits(load_model(source, config, dtype=torch.float32)))


def test_codes_are_not_taken_for_numbers(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    source, config = Source(folder), load_config(folder)
    model = model_without_weights(source, config, dtype=torch.float32)
    weights = StreamedWeights(
        source, CheckpointNames(model, source.tensors), model, read=lambda name: source.tensor(name).to(torch.int8)
    )
    with pytest.raises(DetentError, match="is stored as torch.int8"):
        weights.put(weights.parameters)
