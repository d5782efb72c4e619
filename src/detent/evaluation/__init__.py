"""How good a model is: perplexity on a text."""

from __future__ import annotations

from detent.evaluation.perplexity import PerplexityResult, evaluation_ids, perplexity

__all__ = ["PerplexityResult", "evaluation_ids", "perplexity"]
