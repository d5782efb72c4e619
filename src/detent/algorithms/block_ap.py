"""`block_ap`: all codes and scales of a block trained together (Block-AP of EfficientQAT, arXiv 2407.11062).

Objective: the squared error of the block's outputs against the float block's, on the calibration data. What is trained
starts from what the algorithms before it rounded, and what that was rounded from; the training itself is that of
`detent.algorithms.distill`, with the mean of its last steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from detent.algorithms.block_work import BLOCK_OBJECTIVE, BlockWork, adopt, computing_with, learned_weights
from detent.algorithms.distill import Rates, distill
from detent.algorithms.outcome import Outcome
from detent.algorithms.registry import Handler, LayerFacts, codes_together, quantized_twice, register
from detent.algorithms.site import Wanted
from detent.algorithms.site_work import SiteWork
from detent.config.algorithm import BlockAPCalibConfig

#: Steps' worth of sequences by which it is judged whether a block has become better.
_JUDGES = 2
#: The last share of the steps, of which the mean is taken: with few sequences that generalises better.
_AVERAGED = 0.2


@register(BlockAPCalibConfig)
class BlockAPHandler(Handler[BlockAPCalibConfig]):
    """Nothing at a site; trains the block."""

    scope = "block"
    from_latents = True

    def alone(self, step: BlockAPCalibConfig) -> BlockAPCalibConfig:
        return step if step.alone_steps is None else step.model_copy(update={"steps": step.alone_steps})

    def wants(self, step: BlockAPCalibConfig) -> Wanted:
        return Wanted(references=True)

    def refusal(self, step: BlockAPCalibConfig, layer: LayerFacts) -> str | None:
        return codes_together(layer) or quantized_twice(layer)

    def sees_quantized(self, step: BlockAPCalibConfig, layers: Iterable[LayerFacts]) -> bool:
        return True

    def solve(self, step: BlockAPCalibConfig, site: SiteWork) -> None:
        pass

    def train(self, step: BlockAPCalibConfig, block: BlockWork) -> None:
        name, portions = str(step.method), block.portions
        weights = learned_weights(block.layers, block.ledger)
        with computing_with(weights, block.layers):
            done = distill(
                block.objective,
                portions,
                portions[:: -(-len(portions) // _JUDGES)],
                list(weights.values()),
                steps=step.steps,
                rates=Rates(step.position_rate, step.scale_rate),
                average=_AVERAGED,
                checks=1,
                name=name,
            )
        decided = {"steps": done.steps, "kept": done.kept}
        notice = "" if done.kept else "no step was better, so the weights stay as they were"
        outcome = Outcome(name, BLOCK_OBJECTIVE, done.before, done.after, decided=decided, notice=notice)
        adopt(block.ledger, block.layers, weights, done.kept, outcome)
