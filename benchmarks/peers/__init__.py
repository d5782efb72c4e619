"""Detent beside the tools people use: same model, tokens, bits and group. `python -m benchmarks.peers --help`."""
