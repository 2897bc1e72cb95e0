"""The verbs: the command line and one file a stage."""
