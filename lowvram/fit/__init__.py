"""Whether a run fits: a training step is replayed on meta tensors, compared with a card's memory, and timed."""
