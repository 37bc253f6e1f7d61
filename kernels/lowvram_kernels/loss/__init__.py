"""Losses: linear and cross-entropy as one chunked op."""
