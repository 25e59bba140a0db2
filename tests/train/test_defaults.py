"""What `create` and `train` do where nothing is said."""

import json
import re
from pathlib import Path

import pytest

from fusedgpt.model.config import GPTConfig
from fusedgpt.model.hf_config import hf_config
from fusedgpt.train.config import RECIPES, ConfigError, build_config, read_toml
from fusedgpt.train.defaults import create_config, text_tokens, train_config


def test_create_has_windows_that_fit_the_context() -> None:
    assert create_config({}).max_length == 208
    assert create_config({"block_size": 64}).max_length == 64
    assert create_config({"block_size": 64, "max_length": 32}).max_length == 32
    with pytest.raises(ConfigError, match="--block-size"):
        create_config({"block_size": 0})


def test_train_uses_muon_unless_something_speaks_for_adamw(tmp_path: Path) -> None:
    muon = train_config({}).train
    assert (muon.optimizer, muon.learning_rate, muon.schedule) == ("muon", 4e-3, "linear")
    assert train_config({"steps": 5, "learning_rate": None}) == train_config({"steps": 5})
    for given in ({"learning_rate": 3e-4}, {"optimizer": "adamw"}):
        assert train_config(given) == train_config({}, [{"train": given}]) == build_config({})
    assert train_config({"optimizer": "muon", "learning_rate": 1e-3}).train.weight_decay == 0.1
    (tmp_path / "config.json").write_text(json.dumps(hf_config(GPTConfig(vocab_size=9), eot_id=0)))
    assert train_config({"init_from": str(tmp_path)}).train.optimizer == "adamw"
    assert train_config({"schedule": "wsd"}).train == muon.model_copy(update={"schedule": "wsd"})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_large_presets_train_on_larger_micro_batches(optimizer: str) -> None:
    small, large = (
        train_config({"preset": size, "optimizer": optimizer}).train for size in ("12M", "gpt2-xl")
    )
    assert (small.batch_size, large.batch_size, large.beta2) == (2, 4, 0.95)
    assert large.learning_rate == small.learning_rate
    assert train_config({"preset": "gpt2", "batch_size": 3, "beta2": 0.9}).train.batch_size == 3
    assert train_config({}, [{"model": {"preset": "gpt2"}, "train": {"beta2": 0.9}}]).train.beta2 == 0.9


def test_adamws_learning_rate_falls_with_the_size() -> None:
    def rate(**options: object) -> float:
        return create_config(options).train.learning_rate

    rates = [rate(preset=size, optimizer="adamw") for size in ("3M", "12M", "33M", "gpt2")]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4
    assert {rate(preset=size) for size in ("3M", "gpt2")} == {6e-3}  # Muon's
    assert rate(preset="33M", learning_rate=5e-3) == 5e-3
    assert create_config({"block_size": None}) == create_config({})


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"steps": 100}, (100 * 6 * 208, 100 * 6 * 208)),
        ({"steps": 100, "batch_size": 2, "max_length": 64}, (12_800, 12_800)),
        ({"steps": 100, "batch_tokens": 4096}, (395_200, 395_200)),
        ({"steps": 10**6}, (5_000_000, 5_000_000)),
        ({"epochs": 4}, (180_000, 180_000)),
        ({"refined_tokens": 900}, (900, 900)),
        ({"raw_tokens": 3000, "refined_tokens": 900}, (3000, 900)),
        ({"data_source": "ollama", "gen_model": "a"}, (30_000, 15_000)),
        ({"data_source": "ollama", "gen_model": "a", "preset": "33M"}, (50_000, 25_000)),
        ({"data_source": "ollama", "gen_model": "a", "preset": "gpt2"}, (100_000, 50_000)),
    ],
)
def test_templates_write_what_training_reads(options: dict[str, object], tokens: tuple[int, int]) -> None:
    assert text_tokens(create_config(options)) == tokens


def test_japanese_has_twice_as_many_gpt2_tokens() -> None:
    assert text_tokens(create_config({"steps": 10}), "ja") == (24_960, 24_960)
    assert text_tokens(create_config({"steps": 10, "refined_tokens": 900}), "ja") == (900, 900)


def test_a_language_models_text_is_read_until_held_out_text_says_stop() -> None:
    templates, model = create_config({}), create_config({"data_source": "ollama", "gen_model": "a"})
    assert (templates.train.epochs, templates.train.patience) == (1, None)
    assert (model.train.epochs, model.train.patience, model.data.val_fraction) == (20, 3, 0.1)
    assert (templates.train.optimizer, model.train.optimizer) == ("muon", "adamw")
    assert (templates.train.learning_rate, model.train.learning_rate) == (6e-3, 2e-3)
    assert create_config({"data_source": "ollama", "gen_model": "a", "epochs": 2}).train.epochs == 2


def test_the_original_job_is_one_option() -> None:
    config = create_config({}, [read_toml(Path("original"))])
    assert config == build_config(
        {
            "raw_tokens": 30_000,
            "refined_tokens": 15_000,
            "max_length": 128,
            "learning_rate": 3e-4,
            "min_learning_rate": 3e-5,
            "keep_last": 0,
            "dropout": 0.1,
            "muon_learning_rate": 0.03,  # of no effect
            "muon_momentum": 0.9,
        }
    )
    assert text_tokens(config) == (30_000, 15_000)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_known_by_name_and_says_how_to_run_it(recipe: Path) -> None:
    command = recipe.read_text().splitlines()[0]
    assert re.match(rf"# fusedgpt (create|train) .*--config {recipe.stem}\b", command)
    make = create_config if "create" in command else train_config
    assert make({}, [read_toml(Path(recipe.stem))]) == make({}, [read_toml(recipe)])


def test_an_unknown_recipe_is_answered_by_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"cannot read nope: No such file.*; the recipes are finetune, "):
        read_toml(Path("nope"))
