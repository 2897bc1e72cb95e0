"""One self-contained HTML page of a run: what was read, what it says, how it is drawn."""
