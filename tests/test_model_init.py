from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.config import ModelInitConfig
from flowrl.model_init import create_model, shared_prefix

SMALL = ModelInitConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, max_tokens=64, seed=3)
QUESTIONS = [f"Spell this word backward: {word}" for word in ("sun", "Moon", "star", "sky")]
ANSWERS = ["nus", "nooM", "rats", "yks"]
STORIES = [
    "Natalia sold clips to 48 of her friends for $5 each.\nHow many — exactly?",
    "Weng earns £12 an hour; yesterday she did 50 minutes’ work. 12/60 = <<12/60=0.2>>0.2\n#### 10",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    create_model(path, SMALL, [text for pair in zip(QUESTIONS, ANSWERS, strict=True) for text in pair])
    return path


def test_transformers_loads_every_weight_by_its_name(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    config = loaded.config
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (32, 2, 4, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (48, 64)
    assert loaded.generation_config.eos_token_id == config.eos_token_id == 2


def test_weights_are_drawn_as_hugging_face_draws_them(model: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).state_dict()
    for name, ours in load_file(model / "model.safetensors").items():
        assert ours.shape == theirs[name].shape
        assert torch.allclose(ours.mean(), theirs[name].mean(), atol=3e-3), name
        assert torch.allclose(ours.std(), theirs[name].std(), atol=3e-3), name


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        create_model(tmp_path / name, ModelInitConfig(hidden_size=16, heads=2, seed=seed), ANSWERS)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_letters_and_the_shared_beginning_are_single_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.tokenize(QUESTIONS[1]) == ["Spell this word backward: ", "M", "o", "o", "n"]
    assert tokenizer.tokenize("nooM") == ["n", "o", "o", "M"]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")


@pytest.mark.parametrize("texts", [[*QUESTIONS, *ANSWERS], STORIES], ids=["ascii", "beyond ascii"])
def test_decode_of_encode_gives_the_text_back(tmp_path: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    create_model(tmp_path / "model", SMALL, texts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens) == text


def test_an_open_alphabet_spells_unseen_characters_in_bytes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    create_model(tmp_path / "model", SMALL, STORIES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Übung № 7 ☃"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_shared_beginning_is_that_of_the_prompts_with_their_answers_or_without() -> None:
    assert shared_prefix(sorted([*QUESTIONS, *ANSWERS])) == "Spell this word backward: "
    assert shared_prefix(sorted(QUESTIONS)) == "Spell this word backward: "
    assert shared_prefix(["one text"]) == shared_prefix(sorted(STORIES)) == ""


def test_a_directory_that_exists_is_never_written_over(model: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"^model\.path: .*exists already"):
        create_model(model, SMALL, ["other"])
    assert (model / "model.safetensors").read_bytes() == before


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text"):
        create_model(tmp_path / "model", SMALL, [""])
    assert list(tmp_path.iterdir()) == []


def test_making_a_model_imports_neither_torch_nor_transformers() -> None:

    code = "import sys, flowrl.model_init; print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    said = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert json.loads(said) == []


def test_a_lowercase_tokenizer_knows_no_capitals(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["Spell this word: Sun", "Spell this word: tree", "nuS", "eert"]
    create_model(tmp_path / "m", ModelInitConfig(hidden_size=32, layers=1, intermediate_size=32, lowercase=True), texts)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokens = tokenizer("Spell this word: Sun", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 4
    assert tokenizer.decode(tokens) == "spell this word: sun"
    assert tokenizer.unk_token_id not in tokenizer("Tree", add_special_tokens=False)["input_ids"]
