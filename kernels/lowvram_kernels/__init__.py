"""Tensors in, tensors out: the ops that decide memory and speed.  Import each from its own module."""
