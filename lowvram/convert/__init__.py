"""Exports trained models to other programs' formats and imports theirs; this package knows no training loop."""
