"""Checkpoints in the forms of other programs, and theirs in ours."""
