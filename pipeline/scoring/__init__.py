"""Predictions and labels to figures with intervals."""
