"""Options: what they resolve to, and what an impossible one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from fusedgpt.model.config import PRESETS
from fusedgpt.train.config import (
    ConfigError,
    ModelConfig,
    build_config,
    panel_of,
    parse_set,
    read_toml,
    settings_of,
)


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
        ({"preset": "13M"}, "--preset: should be '1M', '3M', '12M', '33M', '117M', 'gpt2'"),
        ({"batch_size": 0}, r"--batch-size: should be greater than or equal to 1, got 0"),
        ({"steps": "many"}, "--steps: should be a valid integer"),
        ({"n_head": 5}, "n_embd 384 is not a multiple of n_head 5"),
        ({"n_layer": 0}, "--n-layer: should be greater than"),
        ({"max_length": 513}, "--max-length 513 is longer than --block-size 512"),
        ({"schedule": "cosin"}, "--schedule: should be 'constant', 'linear', 'cosine', 'wsd' or"),
        ({"warmup": 11, "steps": 10}, "a run of 10 steps has no room for --warmup 11:"),
        (
            {"warmup": 0.9, "decay": 0.2, "schedule": "wsd"},
            "the run has no room for --warmup 0.9 and ",
        ),
        (
            {"warmup": 60, "decay": 0.5, "schedule": "wsd", "steps": 100},
            "a run of 100 steps has no",
        ),
        ({"batch_tokens": 511}, "--batch-tokens 511 is less than one window of 512"),
        ({"patience": 2, "val_fraction": 0.0}, "--patience needs held-out text"),
        ({"sample_prompt": ["The"]}, "--sample-prompt needs --sample-every"),
        ({"save_every": "0"}, "save_every: expected steps"),
        ({"save_every": "ten minutes"}, "save_every: expected steps"),
        ({"z_loss": float("inf")}, "--z-loss"),
        ({"learning_rate": 1e-4, "min_learning_rate": 1e-3}, "--min-learning-rate 0.001 is above"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
    ],
)
def test_impossible_options_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(options)


def test_every_preset_may_be_chosen() -> None:
    assert get_args(ModelConfig.model_fields["preset"].annotation) == tuple(PRESETS)


@pytest.mark.parametrize("command", ["train", "create", "sample", "chat", "generate", "refine"])
def test_every_setting_is_described(command: str) -> None:
    assert all(field.description for field in settings_of(command).values())


def test_settings_of_generated_texts_are_only_for_create() -> None:
    train, create = settings_of("train"), settings_of("create")
    only = set(create) - set(train)
    assert {"raw_tokens", "refined_tokens", "data_source", "gen_model"} <= only
    assert set(train) - set(create) == {"text_field", "errors"}
    assert {panel_of(create[name])[0] for name in only} == {"Generated texts"}


def test_file_then_flags_then_set(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\nn_layer = 3\n[train]\nbeta2 = 0.95\nsteps = 7\nlearning_rate = 1e-3\n")
    flags = {"steps": 9, "learning_rate": None}
    config = build_config(flags, {"learning_rate": 5.0, "epochs": 4}, layers=[read_toml(file)])
    assert (config.model.n_layer, config.train.beta2, config.train.steps) == (3, 0.95, 9)
    assert (config.train.learning_rate, config.train.epochs) == (1e-3, 4)
    layers = [read_toml(file), parse_set("train.steps=11"), parse_set("data.tokenizer = byte")]
    config = build_config({}, layers=layers)
    assert (config.train.steps, config.data.tokenizer) == (11, "byte")


@pytest.mark.parametrize("tokenizer", ['a "b"\\', "料理/🍜.json", "\x7f\t\n''", ""])
def test_a_written_config_reads_back_the_same(tmp_path: Path, tokenizer: str) -> None:
    options = {"n_layer": 3, "eps": 1e-10, "save_every": "500", "logger": ["wandb"], "tokenizer": tokenizer}
    config = build_config(options)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert build_config({}, layers=[read_toml(tmp_path / "config.toml")]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tran]\nsteps = 1", "unknown section in .*run.toml: 'tran'; did you mean 'train'?"),
        ("[train]\nstep = 1", r"unknown option in \[train\] 'step'; did you mean 'steps'?"),
        ("[train]\nn_layer = 1", r"unknown option in \[train\] 'n_layer'"),
        ("train = 3", r"expected a section \[train\], got train = 3"),
        ("[train", "run.toml is not TOML"),
        ("a = " + "[" * 10_000, "run.toml is not TOML"),
    ],
)
def test_a_wrong_file_says_what(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_config({}, layers=[read_toml(tmp_path / "run.toml")])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent.toml: No such file"):
        read_toml(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "binary.toml")


@pytest.mark.parametrize("assignment", ["steps=3", "train.steps", "train.steps.x=3", "=3"])
def test_a_wrong_set_shows_the_form(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section.name=value, such as"):
        parse_set(assignment)


def test_save_every_is_steps_or_time() -> None:
    steps, minutes = (build_config({"save_every": x}).saving for x in ("500", "1.5m"))
    assert (steps.save_steps, steps.save_seconds) == (500, None)
    assert (minutes.save_steps, minutes.save_seconds) == (None, 90.0)


OLD = """\
[model]
preset = "12M"
n_layer = 2

[data]
tokenizer = "byte"
max_length = 64
packing = false
document_masks = false
val_fraction = 0.1
raw_tokens = 3000

[train]
epochs = 20
batch_size = 2
learning_rate = 0.0006
eps = 1e-08
precision = "auto"
seed = 0

[saving]
save_every = "10m"
keep_last = 0
tensorboard = false

[llm]
data_source = "template"
timeouts = "auto"
fallback = "none"
"""


def test_a_config_of_an_older_version_loads(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(OLD.replace("tensorboard = false", "tensorboard = true"))
    assert build_config({}, layers=[read_toml(tmp_path / "config.toml")]).saving.logger == ["tensorboard"]
    (tmp_path / "config.toml").write_text(OLD)
    config = build_config({}, layers=[read_toml(tmp_path / "config.toml")])
    assert config.saving.logger is None
    assert (config.model.n_layer, config.data.raw_tokens, config.train.learning_rate) == (2, 3000, 6e-4)


def test_a_path_of_a_tokenizer_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is resumed from elsewhere finds it."""
    (tmp_path / "tok.json").touch()
    (tmp_path / "byte").mkdir()  # the name goes before the path
    monkeypatch.chdir(tmp_path)
    layer = {"data": {"tokenizer": "tok.json"}}
    for config in (build_config({"tokenizer": "tok.json"}), build_config({}, layers=[layer])):
        assert config.data.tokenizer == str(tmp_path / "tok.json")
    assert build_config({"tokenizer": "byte"}).data.tokenizer == "byte"
    assert (
        build_config({"tokenizer": "absent"}).data.tokenizer == "absent"
    )  # build_tokenizer says what is wrong
