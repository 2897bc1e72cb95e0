"""The networks: slice CNN, sequence model, and the two joined."""
