"""What holds for all tests: no property is judged by how long an example takes, for the machine may be busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
