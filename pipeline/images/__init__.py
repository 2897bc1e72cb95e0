"""Slices to batches of tensors."""
