"""An outcome as text, for whoever wrote the program."""

from __future__ import annotations

from flowrl.sandbox.sandbox import Outcome


def describe(outcome: Outcome) -> str:
    """What it printed, and how it ended if not well."""
    parts = [part.rstrip("\n") for part in (outcome.stdout, outcome.stderr) if part.strip()]
    if outcome.cut_bytes:
        parts.append(f"[{outcome.cut_bytes} bytes more were cut]")
    if outcome.timed_out:
        parts.append(f"[ended: it ran longer than {outcome.wall_s:.0f} s]")
    elif outcome.exit_code > 128:
        parts.append(f"[ended by signal {outcome.exit_code - 128}: it used more than it may]")
    elif outcome.exit_code and not outcome.stderr.strip():
        parts.append(f"[ended with status {outcome.exit_code}]")
    return "\n".join(parts) or "[it printed nothing]"
