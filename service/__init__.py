"""Weir: one stateless LLM service between applications and OpenAI-compatible models."""

__version__ = "0.1.0"
