"""The machine: the catalogue of cards, what is installed, and what is wrong with it; never imports torch."""
