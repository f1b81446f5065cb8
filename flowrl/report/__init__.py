"""Reads what a run left, checks it and draws it. Writes nothing into a run but its picture."""
