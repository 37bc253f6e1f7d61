"""Files that survive a power cut: durable writing, JSON read back within limits, checkpoints."""
