"""The networks: configuration in, logits out; knows no data, no optimizer."""
