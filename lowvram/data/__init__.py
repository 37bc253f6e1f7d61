"""Tokens from text: reading, tokenizing, packing, loading; knows no model."""
