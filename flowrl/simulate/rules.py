"""Another rule to compare ours with."""

from __future__ import annotations

from transfer_queue.staleness import Accounts


class AdmissionOnly(Accounts):
    """Bounds how many rows are admitted ahead of the version, (η + v + 1)·B in all, and asks nothing when they are
    taken. Cheap, well known, and no bound on what is consumed: one slow row may be any age by the time it is ready."""

    def admissible(self, deadline: int, rows: int) -> bool:
        ahead = sum(self.outstanding.values()) + self.filled
        return not self.awaited_shards and ahead + rows <= (self.max_staleness + 1) * self.batch_rows

    def blocked_at(self, deadline: int, rows: int) -> int | None:
        return None

    def claimable(self, deadline: int, rows: int) -> bool:
        return not self.awaited_shards and self.filled + rows <= self.batch_rows
