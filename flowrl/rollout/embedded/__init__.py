"""The embedded engine: continuous batching in PyTorch, inside the worker's own process.

`core.py` steps a batch and knows no threads; `engine.py` puts it behind the `Engine` protocol. Around the core:
`waiting.py` (who is prefilled next), `slots.py` (who decodes), `runner.py` (one forward), `attention.py`,
`kv_cache.py`, `sampling.py`, `weights.py`.
"""
