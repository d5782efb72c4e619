"""How good a model is: perplexity on a text."""

from __future__ import annotations

from detent.evaluation.perplexity import DEFAULT_WINDOW, PerplexityResult, evaluation_ids, perplexity

__all__ = ["DEFAULT_WINDOW", "PerplexityResult", "evaluation_ids", "perplexity"]
