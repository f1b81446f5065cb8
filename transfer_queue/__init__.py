"""Streams rows between processes, under a staleness bound."""
