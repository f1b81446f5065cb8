"""One distribution, three packages. Tools are configured in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="flowrl",
    version="0.1.0",
    description="Asynchronous, multi-controller reinforcement learning for language models, strict about staleness",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["flowrl*", "controllers*", "transfer_queue*"]),
    install_requires=[
        "torch>=2.10",
        "transformers>=5.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyzmq>=26.0",
        "msgspec>=0.19",
        "omegaconf>=2.4",
        "rich>=13.0",
        "matplotlib>=3.8",
        "aiohttp>=3.9",
        "xxhash>=3.4",
        "zstandard>=0.22",
        "setproctitle>=1.3",
    ],
    extras_require={
        "tasks": ["reasoning-gym>=0.1.20"],
        "parquet": ["pyarrow>=15.0"],
        "sweep": ["optuna>=4.0"],
        "lora": ["peft>=0.18"],
        "sglang": ["sglang>=0.5.20"],
        "cross_check": ["trl>=1.16"],
        "dev": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.10",
            "psutil>=5.9",
            "optuna>=4.0",
            "peft>=0.18",
        ],
    },
    entry_points={
        "console_scripts": ["flowrl = flowrl.cli.main:main", "transfer-queue = transfer_queue.cli:main"],
    },
)
