"""Attention: torch's fused kernels, and decoding over the latent cache of MLA."""
