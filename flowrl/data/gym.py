"""Prompts of a reasoning_gym task: drawn by seed, kept where distinct. The library is slow to import and some tasks are
slow to draw, so the result is kept in the user's cache directory. Splitting is not done here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flowrl.config import DataConfig
from flowrl.data.example import Example


class Item(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a drawn entry; the verifier draws entry `item` again, exactly as it was."""

    item: int
    question: str
    answer: str | None


def draw_examples(data: DataConfig) -> list[Example]:
    """At most `data.size` examples, distinct by question. Their `extra_info` is what `flowrl/rewards/gym.py` needs.

    Raises ValueError if the task or an option of it is unknown.
    """
    task = data.task
    assert task is not None, "DataConfig refuses a reasoning_gym source without a task"
    shared = {"task": task, "options": dict(data.options), "seed": data.seed, "size": data.size}
    return [
        Example(
            index=index,
            prompt=item.question,
            data_source=task,
            ground_truth=item.answer,
            extra_info={**shared, "item": item.item},
            demonstration=item.answer,
            origin=f"{task}[{item.item}]",
        )
        for index, item in enumerate(_items(data))
    ]


def _items(data: DataConfig) -> list[Item]:
    path = _cache_file(data)
    items = _kept(path)
    if items is None:
        items = list(_draw(data))
        _keep(path, msgspec.json.encode(items))
    return items


def _kept(path: Path) -> list[Item] | None:
    """None if nothing whole is there: then it is drawn, and replaced."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Item])
    except (OSError, msgspec.MsgspecError):
        return None


def _draw(data: DataConfig) -> Iterator[Item]:
    seen: set[str] = set()
    for number, entry in enumerate(open_task(data.task or "", data.options, data.size, data.seed)):
        question = str(entry["question"])
        if question not in seen:
            seen.add(question)
            yield Item(number, question, None if entry["answer"] is None else str(entry["answer"]))


def open_task(task: str, options: dict[str, Any], size: int, seed: int) -> Any:
    """The reasoning_gym data set. Raises ValueError naming the field at fault."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("data.source: 'reasoning_gym'; needs the library: pip install 'flowrl[tasks]'") from error
    if task not in DATASETS:
        raise ValueError(f"data.task: {task!r}; no such task in reasoning_gym")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"data.options: {options!r}; {task} refuses them: {error}") from error


def _cache_file(data: DataConfig) -> Path:
    try:
        library = importlib.metadata.version("reasoning_gym")
    except importlib.metadata.PackageNotFoundError:
        library = "missing"
    drawn = msgspec.json.encode([library, data.task, data.options, data.size, data.seed], order="sorted")
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return root / "flowrl" / f"{data.task}-{hashlib.sha256(drawn).hexdigest()[:16]}.json"


def _keep(path: Path, content: bytes) -> None:
    """By one rename, since several processes may do so at once. A home that cannot be written to is no error: the next
    process draws again."""
    making = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        making.write_bytes(content)
        making.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            making.unlink(missing_ok=True)
