"""Trained models in other programs' formats, and their models as ours."""
