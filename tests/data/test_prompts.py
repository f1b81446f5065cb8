from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flowrl.config import ModelInitConfig
from flowrl.data.example import Dataset, Example
from flowrl.data.prompts import PromptEncoder, load_tokenizer
from flowrl.model_init import create_model

QUESTIONS = ["Reverse this word: cat", "Reverse this word: mouse", "Reverse this word: horse"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    create_model(path, ModelInitConfig(hidden_size=16, layers=1, heads=2, kv_heads=1), [*QUESTIONS, "tac", "esuom"])
    return path


def dataset(prompts: list[str]) -> Dataset:
    return Dataset(
        Example(index=index, prompt=prompt, data_source="words", ground_truth=None)
        for index, prompt in enumerate(prompts)
    )


def test_a_string_is_encoded_as_one_user_message_with_the_generation_prompt(model: Path) -> None:
    encoder = PromptEncoder(model, 100)
    tokens = encoder.encode(QUESTIONS[0])
    assert tokens == encoder.encode([{"role": "user", "content": QUESTIONS[0]}])
    said = encoder.tokenizer.convert_ids_to_tokens(list(tokens))
    assert said == ["Reverse this word: ", "c", "a", "t", "<answer>"]


def test_the_batch_is_encoded_as_each_prompt_alone(model: Path) -> None:
    encoder = PromptEncoder(model, 100)
    encoded = encoder.encode_all(dataset(QUESTIONS))
    assert encoded.prompts == [encoder.encode(question) for question in QUESTIONS]
    assert (encoded.indices, encoded.dropped) == ([0, 1, 2], 0)


def test_prompts_that_are_too_long_are_dropped_and_counted(model: Path) -> None:
    encoded = PromptEncoder(model, 6).encode_all(dataset([QUESTIONS[1], QUESTIONS[0], QUESTIONS[2]]))
    assert (encoded.indices, encoded.dropped) == ([1], 2)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens: 3; every prompt is longer, the shortest has 5"):
        PromptEncoder(model, 3).encode_all(dataset(QUESTIONS))


def test_no_prompts_encode_to_none(model: Path) -> None:
    assert PromptEncoder(model, 6).encode_all(dataset([])).prompts == []


def test_decode_leaves_special_tokens_out(model: Path) -> None:
    encoder = PromptEncoder(model, 100)
    response = encoder.encode_response("esuom")
    assert response[-1] == encoder.tokenizer.eos_token_id
    assert encoder.decode(np.array(response, dtype=np.int32)) == "esuom"
    assert encoder.decode(np.array([], dtype=np.int32)) == ""


def test_a_response_continues_its_prompt_as_the_template_renders_both(model: Path) -> None:
    encoder = PromptEncoder(model, 100)
    both = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "tac"}]
    rendered = encoder.tokenizer.apply_chat_template(both, tokenize=False)
    assert tuple(encoder.tokenizer(rendered)["input_ids"]) == encoder.encode(QUESTIONS[0]) + encoder.encode_response(
        "tac"
    )


def test_every_file_that_names_an_end_of_sequence_is_heard(model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    change(copy / "generation_config.json", eos_token_id=[7, 2])
    change(copy / "config.json", eos_token_id=9, text_config={"eos_token_id": 11})
    assert PromptEncoder(copy, 100).stop_token_ids == (2, 7, 9, 11)
    assert PromptEncoder(model, 100).stop_token_ids == (2,)


def test_a_model_without_a_chat_template_is_refused(model: Path, tmp_path: Path) -> None:
    copy = copied(model, tmp_path)
    change(copy / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ValueError, match=r"model\.path: .*must have a chat template"):
        PromptEncoder(copy, 100)


def test_the_light_tokenizer_is_the_one_that_auto_tokenizer_loads(model: Path) -> None:
    from transformers import AutoTokenizer

    light, full = load_tokenizer(model), AutoTokenizer.from_pretrained(model)
    assert type(light) is type(full)
    assert light.get_vocab() == full.get_vocab()
    assert light(QUESTIONS)["input_ids"] == full(QUESTIONS)["input_ids"]


def copied(model: Path, folder: Path) -> Path:
    copy = folder / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
