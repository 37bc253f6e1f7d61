"""What an op says when its arguments cannot be right; imports nothing."""


class ShapeError(ValueError):
    """A tensor whose shape, dtype or device an op cannot take; the text names the value and the rule."""
