"""TRL's half of the trainer's benchmark: the optimizer step of its GRPOTrainer on the batch of benchmarks/trainer.py.

Run by that script, with the interpreter of an environment that has TRL (benchmarks/time_to_reward_trl.py says how to
make one). Generation and rewards are left out: the trainer is handed the batch where it would have generated it, padded
to the longest prompt on the left and to the longest response on the right, as it pads itself.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import TrainerCallback

from benchmarks.trainer_batch import CLIP_HIGH, CLIP_LOW, GRAD_CLIP, LEARNING_RATE, Batch, load_batch


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    num_rows = len(batch.prompts)
    prompt_length, response_length = max(map(len, batch.prompts)), max(map(len, batch.responses))
    tensors = {
        "prompt_ids": torch.zeros(num_rows, prompt_length, dtype=torch.long),
        "prompt_mask": torch.zeros(num_rows, prompt_length, dtype=torch.long),
        "completion_ids": torch.zeros(num_rows, response_length, dtype=torch.long),
        "completion_mask": torch.zeros(num_rows, response_length, dtype=torch.long),
        "old_per_token_logps": torch.zeros(num_rows, response_length),
        "advantages": torch.from_numpy(batch.advantages),
    }
    for row in range(num_rows):
        prompt, response = batch.prompts[row], batch.responses[row]
        tensors["prompt_ids"][row, prompt_length - len(prompt) :] = torch.from_numpy(prompt)
        tensors["prompt_mask"][row, prompt_length - len(prompt) :] = 1
        tensors["completion_ids"][row, : len(response)] = torch.from_numpy(response)
        tensors["completion_mask"][row, : len(response)] = 1
        tensors["old_per_token_logps"][row, : len(response)] = torch.from_numpy(batch.old[row])
    return tensors


class GivenBatchTrainer(trl.GRPOTrainer):
    """TRL's trainer, which takes micro-batches of a given batch in turn."""

    def give(self, batch: Batch, micro_rows: int) -> None:
        tensors = padded(batch)
        num_items = tensors["completion_mask"].sum().float()
        self.parts = [
            {name: tensor[start : start + micro_rows] for name, tensor in tensors.items()}
            | {"num_items_in_batch": num_items}
            for start in range(0, len(batch.prompts), micro_rows)
        ]
        self.place = 0
        self.losses: list[float] = []

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
        part = self.parts[self.place % len(self.parts)]
        self.place += 1
        return part

    def compute_loss(self, *arguments: Any, **more: Any) -> torch.Tensor:
        loss = super().compute_loss(*arguments, **more)
        self.losses.append(float(loss.detach()))
        return loss


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.begun = self.cpu_begun = 0.0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self.cpu_seconds.append(time.process_time() - self.cpu_begun)


def main(folder: str, threads: str, num_steps: str, micro_rows: str) -> None:
    torch.set_num_threads(int(threads))
    batch = load_batch(Path(folder) / "batch.npz")
    num_parts = len(batch.prompts) // int(micro_rows)
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        trainer = GivenBatchTrainer(
            model=str(Path(folder) / "model"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w3"] * len(batch.prompts)}),
            callbacks=[clock],
            args=trl.GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=int(micro_rows),
                gradient_accumulation_steps=num_parts,
                num_generations=int(micro_rows),
                max_completion_length=max(map(len, batch.responses)),
                max_steps=int(num_steps) + 1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=GRAD_CLIP,
                adam_beta2=0.999,
                optim="adamw_torch_fused",
                loss_type="dapo",
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                model_init_kwargs={"dtype": "float32"},
            ),
        )
        trainer.give(batch, int(micro_rows))
        trainer.train()
    # Each micro-batch's loss is over the tokens of the whole batch; the Trainer's own division cancels.
    loss = sum(trainer.losses[:num_parts])
    timed = {"seconds": clock.seconds[1:], "cpu_seconds": clock.cpu_seconds[1:]}
    print(json.dumps({"loss": loss, **timed, "version": trl.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
