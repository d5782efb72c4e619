"""What a model's structure says about quantizing it: found by running it, not listed per model."""

from detent.structure.shared_inputs import linears_sharing_input

__all__ = ["linears_sharing_input"]
