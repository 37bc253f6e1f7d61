"""Numbers of 8 bits and what makes them: E4M3 and INT8 codes with scales, and back."""
