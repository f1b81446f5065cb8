"""The rival's half of the time-to-reward comparison: TRL's GRPOTrainer on the same model, prompts, reward and batch.

In an environment of its own, since TRL pins what it needs:

    python3.11 -m venv TRL && TRL/bin/pip install torch==2.13.0
    TRL/bin/pip install trl datasets msgspec omegaconf reasoning-gym
    TRL/bin/python benchmarks/time_to_reward_trl.py --model DIR --train TRAIN.jsonl --held-out TEST.jsonl --out R.json

Measured: `loop_s`, from the first update's start until greedy accuracy on the held-out prompts reaches the target, the
time of evaluations taken off; `startup_s`, from the interpreter's start to there. The settings are the fastest found on
two cores: one generation and one optimizer step an update, no gradient checkpointing, no logging, prompts rendered
beforehand, a fused optimizer. Prompts and reward come from FlowRL's own code, so that both halves score alike.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flowrl.config import RewardConfig  # noqa: E402
from flowrl.data.datasets import load_file  # noqa: E402
from flowrl.data.example import Dataset  # noqa: E402
from flowrl.rewards.function import RewardFunction, load_reward  # noqa: E402
from flowrl.trainer.schedule import learning_rate  # noqa: E402

PEAK_LEARNING_RATE = 3e-4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the warm-started Hugging Face directory")
    parser.add_argument("--train", type=Path, required=True, help="JSONL of training prompts")
    parser.add_argument("--held-out", type=Path, required=True, help="JSONL of prompts to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="where the result goes")
    parser.add_argument("--reward", default="reasoning_gym_exact", help="a reward of FlowRL's, by name")
    parser.add_argument("--target", type=float, default=0.86, help="greedy accuracy at which the loop ends")
    parser.add_argument("--max-steps", type=int, default=1200, help="updates after which the loop ends anyway")
    parser.add_argument("--evaluate-every", type=int, default=50, help="updates between two evaluations")
    parser.add_argument("--prompts", type=int, default=32, help="of an update")
    parser.add_argument("--group-size", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--max-tokens", type=int, default=8, help="of a response")
    parser.add_argument("--threads", type=int, default=2, help="that torch computes with")
    parser.add_argument("--beta2", type=float, default=0.99, help="of AdamW")
    parser.add_argument("--scale-rewards", default="group", choices=("group", "none"), help="by the group's spread")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def rendered_prompts(tokenizer: Any, examples: Dataset) -> list[str]:
    """Once, not at every update: TRL takes strings as they are."""
    conversations = [example.messages for example in examples]
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)


class Evaluation:
    """Greedy accuracy on all held-out prompts, in one batch."""

    def __init__(self, tokenizer: Any, examples: Dataset, reward: RewardFunction, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.examples = examples
        self.reward = reward
        self.max_tokens = max_tokens
        prompts = rendered_prompts(tokenizer, examples)
        self.inputs = tokenizer(
            prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        model.eval()
        tokens = model.generate(
            input_ids=self.inputs["input_ids"],
            attention_mask=self.inputs["attention_mask"],
            max_new_tokens=self.max_tokens,
            do_sample=False,
        )
        model.train()
        responses = tokens[:, self.inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = self.reward(list(self.examples), texts)
        return sum(score.accuracy for score in scores) / len(scores)


class Stopwatch(transformers.TrainerCallback):
    """Times the loop without its evaluations, and ends it at the target."""

    def __init__(self, evaluation: Evaluation, every: int, target: float) -> None:
        self.evaluation = evaluation
        self.every = every
        self.target = target
        self.startup_s = 0.0
        self.evaluation_s = 0.0
        self.points: list[dict[str, float]] = []
        self.loop_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.startup_s = time.perf_counter() - STARTED
        self.loop_started = time.perf_counter()
        self._evaluate(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        if (state.global_step % self.every == 0 or is_last) and self._evaluate(state.global_step, kwargs["model"]):
            control.should_training_stop = True

    def _evaluate(self, step: int, model: Any) -> bool:
        started = time.perf_counter()
        loop_s = started - self.loop_started - self.evaluation_s
        accuracy = self.evaluation.accuracy(model)
        self.points.append({"step": step, "loop_s": round(loop_s, 3), "accuracy": accuracy})
        print(f"update {step}: {loop_s:.1f} s, accuracy {accuracy:.3f}", flush=True)
        self.evaluation_s += time.perf_counter() - started
        return accuracy >= self.target


def settings(given: argparse.Namespace, folder: str) -> trl.GRPOConfig:
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        seed=given.seed,
        max_steps=given.max_steps,
        per_device_train_batch_size=given.prompts * given.group_size,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=given.group_size,
        max_completion_length=given.max_tokens,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        scale_rewards=given.scale_rewards,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )


def make_trainer(
    given: argparse.Namespace, folder: str, model: Any, tokenizer: Any, train: Dataset, reward: RewardFunction
) -> trl.GRPOTrainer:
    def score(prompts: list[str], completions: list[str], index: list[int], **columns: Any) -> list[float]:
        return [result.value for result in reward([train[each] for each in index], completions)]

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, given.beta2), weight_decay=0.0, fused=True
    )
    rate = functools.partial(
        learning_rate, peak=1.0, warmup_steps=10, schedule="linear", decay_steps=1200, final_ratio=0.1
    )
    columns = {"prompt": rendered_prompts(tokenizer, train), "index": list(range(len(train)))}
    return trl.GRPOTrainer(
        model=model,
        args=settings(given, folder),
        processing_class=tokenizer,
        reward_funcs=score,
        train_dataset=datasets.Dataset.from_dict(columns),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    )


def result(given: argparse.Namespace, watch: Stopwatch) -> dict[str, Any]:
    last = watch.points[-1]
    reached = next((point for point in watch.points if point["accuracy"] >= given.target), None)
    return {
        "framework": "trl",
        "target": given.target,
        "reached": reached is not None,
        "steps_to_target": reached and reached["step"],
        "loop_s_to_target": reached and reached["loop_s"],
        "startup_s": round(watch.startup_s, 3),
        "seconds_per_step": last["loop_s"] / last["step"] if last["step"] else None,
        "accuracy": watch.points,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl, datasets)},
        "machine": f"{platform.machine()}, {given.threads} threads",
    }


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    transformers.set_seed(given.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    train, held_out = Dataset(load_file(given.train)), Dataset(load_file(given.held_out))
    reward = load_reward(RewardConfig(name=given.reward), Path.cwd())
    watch = Stopwatch(Evaluation(tokenizer, held_out, reward, given.max_tokens), given.evaluate_every, given.target)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(given, folder, model, tokenizer, train, reward)
        trainer.add_callback(watch)
        trainer.train()
    measured = result(given, watch)
    given.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(
        json.dumps({name: measured[name] for name in ("reached", "loop_s_to_target", "seconds_per_step", "startup_s")})
    )


if __name__ == "__main__":
    main()
