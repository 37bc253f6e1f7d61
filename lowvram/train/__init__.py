"""Learning: one step, the loop around it, what survives a stop."""
