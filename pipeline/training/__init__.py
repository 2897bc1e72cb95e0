"""Training loops of the three learning stages, and their records."""
