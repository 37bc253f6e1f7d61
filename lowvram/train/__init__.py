"""Training: one step, the loop around it, and the state that a checkpoint saves; this package knows no command line."""
