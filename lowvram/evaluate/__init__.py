"""Measures how good a model is, in numbers that can be compared; knows no training loop."""
