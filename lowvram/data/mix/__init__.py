"""Text from several sources: which they are, how much of each is taken, and which share of a run each has."""
