"""Optimizers: AdamW with 8-bit moments, and Muon."""
