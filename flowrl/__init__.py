"""FlowRL: asynchronous reinforcement learning for language models, strict about staleness. See docs/architecture.md."""

__version__ = "0.1.0"
