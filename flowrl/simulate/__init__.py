"""A run in virtual time: engines and a trainer that only sleep, around the queue's own shards and ledger.

What is simulated is how long things take. What is admitted, taken, refused and dropped is decided by the very code that
decides it in a run, so that a simulation finds what a run would do, and checks the staleness bound over histories that
no machine has time for.
"""

from flowrl.simulate.durations import Constant, Durations, LogNormal, Measured
from flowrl.simulate.outcome import Outcome
from flowrl.simulate.setting import Setting
from flowrl.simulate.simulation import Deadlock, simulate

__all__ = ["Constant", "Deadlock", "Durations", "LogNormal", "Measured", "Outcome", "Setting", "simulate"]
