"""Randomness from counters and keys, and what rounds with it."""
