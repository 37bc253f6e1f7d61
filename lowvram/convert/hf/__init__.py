"""Writes and reads models in the format of Hugging Face's transformers; this package knows no training loop."""
