"""Retrains a run from its record, bit for bit: `record.py` is written by the run, the rest reads it."""
