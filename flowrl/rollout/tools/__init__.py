"""Tools that a model may call: those of ours, and functions of the user's by dotted path."""
