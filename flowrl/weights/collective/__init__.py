"""Weights straight from trainer ranks into engines, by torch.distributed, where their devices see each other.

    trainer rank   casts its shard into one flat buffer (`staging`); a thread for each engine gives from it (`giver`)
    engine         asks for a version, and receives it into its parameters between two decode steps (`receiver`)

An engine and all trainer ranks are one process group (`group`), made when the engine starts and kept warm. What is sent
is the plan's: each rank's bytes of the version, in rounds of `weights.bucket_mb` (`rounds`).
"""
