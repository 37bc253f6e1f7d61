"""Generates text with a model: sampling, decoding with a KV cache, conversations."""
