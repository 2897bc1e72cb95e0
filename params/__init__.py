"""Parameter files that install with the package: ``ichpipe --params NAME`` and ``ichpipe init`` read them."""
