"""Slices to cached embeddings, and those to sequences."""
