"""Says before a run what it will need and what of it this machine lacks. Starts nothing."""
