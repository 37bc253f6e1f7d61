"""Turns text into batches of tokens: reading, tokenizing, packing, loading; this package knows no model."""
