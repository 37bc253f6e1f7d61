"""Durable files: writing that survives a power cut, JSON that is read within limits, checkpoints."""
