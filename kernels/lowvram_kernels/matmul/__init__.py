"""Matrix products: masters cast or quantised at use, 8-bit operands, and few rows by a quantised weight."""
