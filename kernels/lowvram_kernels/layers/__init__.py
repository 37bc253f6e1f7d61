"""What a block does beside its products: norm, SwiGLU, embedding, dropout, and norms fused with projections."""
