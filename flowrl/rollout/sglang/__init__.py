"""The SGLang engine: servers of their own environment, spoken to over HTTP. Meaning and set-up: docs/sglang.md."""
