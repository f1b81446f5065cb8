"""Who samples what, where: pure decisions, which the rollout stage, engines of several servers and
`benchmarks/long_tail.py` share."""
