"""Runs Python that nobody has read: what it may see, use and take is bounded. Knows no model and no episode."""
