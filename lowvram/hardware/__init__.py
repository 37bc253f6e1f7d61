"""The machine: known cards, what is installed, what is wrong with it; never imports torch."""
