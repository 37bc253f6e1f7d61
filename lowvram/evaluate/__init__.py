"""How good a model is: numbers that can be compared."""
