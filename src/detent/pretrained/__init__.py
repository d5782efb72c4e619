"""Hugging Face models: loading them, and what their configurations say."""
