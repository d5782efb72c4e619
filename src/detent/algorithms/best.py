"""`best`: the lowest perplexity for a number of bits in little time: `gptq`, `block_ap` on each block, `distill`.

`gptq` gives each layer a good start, `block_ap` lets the layers of a block make up for each other's errors, `distill`
those of the whole model. `distill` passes over the data once at most, and is left out where that is too little to
learn from; `block_ap` then takes twice as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from detent.algorithms.registry import Handler, register
from detent.config.algorithm import (
    BestCalibConfig,
    BlockAPCalibConfig,
    DataAlgorithmConfig,
    DistillCalibConfig,
    GPTQCalibConfig,
    QuantizeAlgorithmConfig,
)

#: Ranges that are tried for each group: more than `gptq` does by itself.
_SEARCH_STEPS = 12


@register(BestCalibConfig)
class BestHandler(Handler[BestCalibConfig]):
    """Nothing by itself; see `parts`."""

    def parts(self, step: BestCalibConfig) -> Sequence[QuantizeAlgorithmConfig]:
        data = {name for name in DataAlgorithmConfig.model_fields if name != "method"}
        own = {name: getattr(step, name) for name in data & step.model_fields_set | {"max_tokens"}}
        parts: list[QuantizeAlgorithmConfig] = [GPTQCalibConfig(search_steps=_SEARCH_STEPS, **own)]
        if step.block_steps:
            parts.append(BlockAPCalibConfig(steps=step.block_steps, alone_steps=2 * step.block_steps, **own))
        if step.steps:
            parts.append(DistillCalibConfig(steps=step.steps, passes=1))
        return parts
