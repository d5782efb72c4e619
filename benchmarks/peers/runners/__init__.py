"""One small script per peer, run in that peer's own environment."""
