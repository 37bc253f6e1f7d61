"""Text from a model: sampling, decoding through a cache, conversation."""
