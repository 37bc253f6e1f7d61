"""What fits: the real step rehearsed on paper, held against a card, and timed."""
