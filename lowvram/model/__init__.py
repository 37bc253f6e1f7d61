"""The networks, which map token ids to logits; this package knows no data and no optimizer."""
