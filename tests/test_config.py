"""Options: what they resolve to, and what an impossible one says."""

from __future__ import annotations

from typing import Any

import pytest

from fusedgpt.train.config import ConfigError, build_config, option_fields


def test_options_land_in_their_section() -> None:
    config = build_config({"n_layer": 2, "tokenizer": "byte", "learning_rate": 1e-3, "n_head": None})
    assert config.model.n_layer == 2
    assert config.data.tokenizer == "byte"
    assert config.train.learning_rate == 1e-3
    assert config.model.gpt_config(257).n_head == 6  # the preset's
    assert config.model.gpt_config(257).vocab_size == 257


def test_given_options_go_before_defaults() -> None:
    assert build_config({"max_length": 64}, {"max_length": 128}).max_length == 64
    assert build_config({"max_length": None}, {"max_length": 128}).max_length == 128
    assert build_config({}).max_length == 512
    assert build_config({"block_size": 32}).max_length == 32


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "12M"), ({"preset": "gpt2"}, "gpt2"), ({"n_embd": 96}, "custom")]
)
def test_name_of_a_model(changes: dict[str, Any], name: str) -> None:
    assert build_config(changes).model.name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1}, "unknown option 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"xyzzy": 1}, "unknown option 'xyzzy'$"),
        ({"preset": "13M"}, "no preset '13M'; there are 12M, 33M, 117M, gpt2"),
        ({"batch_size": 0}, r"batch_size: Input should be greater than or equal to 1 \(got 0\)"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"n_head": 5}, "n_embd 384 is not a multiple of n_head 5"),
        ({"n_layer": 0}, "n_layer: Input should be greater than"),
        ({"max_length": 513}, "max_length 513 is longer than block_size 512"),
        ({"schedule": "linear"}, "schedule: Input should be 'cosine' or 'constant'"),
        ({"learning_rate": 1e-4, "min_learning_rate": 1e-3}, "min_learning_rate 0.001 is above"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_impossible_options_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(options)


def test_every_option_is_described() -> None:
    assert all(field.description for field in option_fields().values())
