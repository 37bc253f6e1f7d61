"""Mixture of experts: the routed layer, products of all experts in one launch, idle experts in low precision."""
