"""Writes models as GGUF files for llama.cpp; this package knows no training loop."""
