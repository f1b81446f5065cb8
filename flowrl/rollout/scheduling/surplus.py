"""Which groups an engine stops working on, because no update can hold them any more. Pure."""

from __future__ import annotations


def is_overdue(deadline: int, version: int) -> bool:
    """deadline: the last update that a group may be in, as its reservation says; version: of the weights that the
    engine has loaded, which came out of all updates before it. Only what was reserved as surplus
    (`rollout.oversampling`) ever is; the queue drops it by itself."""
    return deadline < version
