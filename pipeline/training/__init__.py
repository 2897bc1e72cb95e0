"""What the three learning steps do."""
