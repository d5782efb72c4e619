"""How calibration data is fed to a list of algorithms: what each step asks for, decided once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detent.algorithms.registry import handler_of
from detent.config.algorithm import DataAlgorithmConfig, QuantizeAlgorithmConfig
from detent.errors import DetentError


@dataclass(frozen=True)
class Traversal:
    """How data is fed to the algorithms that run together.

    Each is what the steps ask for, as `DataAlgorithmConfig` describes it; where none does, what suits them best.

    Attributes:
        by_blocks: traverse the model block by block.
        notifies: whether the user is told if that isn't possible.
        inputs: ``"float"``, ``"quantized"`` or None: decided by the formats.
        spill: keep the inputs of blocks on disk.
        max_tokens: the largest number of tokens to observe; None for all.
        min_tokens: that an expert's layer needs.
        one_by_one: number of the first step that wants sites observed one after the other; None if there is none.
    """

    by_blocks: bool
    notifies: bool
    inputs: str | None
    spill: bool
    max_tokens: int | None
    min_tokens: int
    one_by_one: int | None

    @staticmethod
    def of(steps: Sequence[QuantizeAlgorithmConfig]) -> Traversal:
        """That of steps that run together.

        Raises:
            DetentError: two of them ask for different things.
        """
        data = [step for step in steps if isinstance(step, DataAlgorithmConfig)]
        layerwise = _agreed(data, "layerwise")
        suits = any(handler_of(step).block_by_block for step in data)
        needs = any(handler_of(step).needs_blocks(step) for step in data)
        max_tokens = _agreed(data, "max_tokens")
        min_tokens = _agreed([step for step in data if "min_tokens" in step.model_fields_set], "min_tokens")
        return Traversal(
            by_blocks=suits if layerwise is None else layerwise,
            notifies=suits or bool(layerwise) or needs,
            inputs=_agreed(data, "inputs"),
            spill=any(step.spill for step in data),
            max_tokens=max_tokens,
            min_tokens=DataAlgorithmConfig().min_tokens if min_tokens is None else min_tokens,
            one_by_one=next((i for i, step in enumerate(steps) if handler_of(step).one_by_one(step)), None),
        )


def _agreed(steps: Sequence[DataAlgorithmConfig], name: str) -> Any:
    """The value that steps give an option; None if none does."""
    given = [(step, value) for step in steps if (value := getattr(step, name)) is not None]
    for step, value in given[1:]:
        first, before = given[0]
        if value != before:
            raise DetentError(
                f"{name}: {first.method} asks for {before!r} and {step.method} for {value!r}, but they share"
                " one run over the data; give one value, or leave it out in one of them"
            )
    return given[0][1] if given else None
