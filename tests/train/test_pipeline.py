"""create and train, end to end, with a model of one small layer."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ollama_fake import Fake

from fusedgpt.model.folder import load_folder, save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.hf_config import list_folders
from fusedgpt.model.tokenizer import byte_tokenizer, gpt2_tokenizer
from fusedgpt.train import pipeline
from fusedgpt.train.config import RunConfig, build_config
from fusedgpt.train.data.synthetic import collect
from fusedgpt.train.data.synthetic.collect import generate_texts
from fusedgpt.train.data.synthetic.task import Task, count_gpt2_tokens
from fusedgpt.train.pipeline import create_config, run_full_pipeline, train_on_files
from fusedgpt.train.report.metrics import read_metrics
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.tools import quality

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 48, "max_length": 32, "steps": 4}
FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "dataset.json",
    "dataset.txt",
    "generation_info.json",
    "README.md",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories are made where one stands. The report at the end of `create` is a short one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr(quality, "_SAMPLED", 10)
    monkeypatch.setattr(quality, "_FRESH", 10)


def tiny(**changes: object) -> RunConfig:
    return create_config({**TINY, "raw_tokens": 3000, "refined_tokens": 1500, **changes})


def test_create_makes_the_whole_folder(tmp_path: Path) -> None:
    prompt = "A poem about the sea \x1b[31m ../../x 😀"
    result = run_full_pipeline(prompt, tiny(), tmp_path)
    assert {f.name for f in result.model_path.iterdir()} == FILES
    assert result.model_path.parent == tmp_path
    assert result.model_path.name.startswith("poetry_")
    assert list(result.samples) == ["", "The", "Today"]
    assert all(text.startswith(p) for p, text in result.samples.items())
    model, _ = load_folder(result.model_path)
    assert (model.config.block_size, model.config.window) == (48, 32)

    info = json.loads((result.model_path / "generation_info.json").read_text())
    dataset = json.loads((result.model_path / "dataset.json").read_text())
    assert info["prompt"] == dataset["prompt"] == prompt
    assert info["domain"] == "poetry"
    assert info["generation_method"] == "template"
    assert info["training"]["val_loss"] == result.summary.val_loss
    assert result.quality is not None
    assert info["quality"] == result.quality
    assert (info["quality"]["sampled"], len(info["quality"]["samples"])) == (10, 8)
    texts = dataset["samples"]
    assert (result.model_path / "dataset.txt").read_text() == "\n\n".join(texts) + "\n"
    kept = sum(map(len, gpt2_tokenizer().encode_batch(texts)))
    assert kept == info["refinement"]["kept_tokens"]
    assert 1500 <= kept < 1700
    assert info["samples_generated"] == len(texts) + sum(info["refinement"]["dropped"].values())


def test_the_prompt_reaches_generator_and_refiner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("generate_samples", "refine"):
        original = getattr(collect, name)

        def spy(*args: object, original: Callable[..., object] = original, **kwargs: object) -> object:
            seen.extend(arg for arg in args if isinstance(arg, str))
            return original(*args, **kwargs)

        monkeypatch.setattr(collect, name, spy)
    run_full_pipeline("poems about dragons", tiny(steps=1), tmp_path)
    assert seen == ["poems about dragons"] * 2


def test_same_seed_same_file(tmp_path: Path) -> None:
    paths = [run_full_pipeline("poems", tiny(seed=s), tmp_path).model_path for s in (1, 1, 2)]
    hashes = [hashlib.sha256((p / "model.safetensors").read_bytes()).hexdigest() for p in paths]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("prompt", ["", "/" * 10_000, "😀", "..", "\x00\n"])
def test_any_prompt_makes_a_folder_inside(tmp_path: Path, prompt: str) -> None:
    path = run_full_pipeline(prompt, tiny(steps=1), tmp_path / "root").model_path
    assert [p.name for p in tmp_path.iterdir()] == ["root"]
    assert [p.name for p in (tmp_path / "root").iterdir()] == [path.name]
    json.loads((path / "generation_info.json").read_text())


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
def test_train_on_files(tmp_path: Path, tokenizer: str) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The cat sat on the mat. Today it rained. " * 40)
    result = train_on_files([text], build_config({**TINY, "tokenizer": tokenizer}), tmp_path / "models")
    model, loaded = load_folder(result.model_path)
    assert loaded.kind == tokenizer
    assert model.config.vocab_size == loaded.vocab_size
    assert result.model_path.name.startswith("custom_")
    assert json.loads((result.model_path / "generation_info.json").read_text())["data"] == [str(text)]
    assert json.loads((result.model_path / "config.json").read_text())["n_positions"] == 48


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The cat sat on the mat. Today it rained. " * 40)
    for rate, told in ((1.0, True), (1e-3, False)):
        config = build_config({**TINY, "tokenizer": "byte", "learning_rate": rate, "warmup": 0, "steps": 9})
        said = io.StringIO()
        train_on_files([text], config, tmp_path / "m", Monitor(stream=said))
        assert ("the loss is above 5.55, that of a guess" in said.getvalue()) is told, said.getvalue()


def test_packing_and_document_masks_reach_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "The cat sat."}\n{"text": "It rained, today."}\n' * 30)
    seen: list[torch.Tensor] = []

    def hidden(model: GPT, idx: torch.Tensor, *, documents: torch.Tensor | None = None, **rest: Any) -> Any:
        if documents is not None:
            seen.append(torch.stack([idx, documents]))
        return GPT_hidden(model, idx, documents=documents, **rest)

    GPT_hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", hidden)
    config = build_config({**TINY, "tokenizer": "byte", "packing": True, "document_masks": True})
    train_on_files([tmp_path / "t.jsonl"], config, tmp_path / "m")
    training = [(idx, documents) for idx, documents in seen if len(idx) == config.train.batch_size]
    assert len(training) >= TINY["steps"]
    for idx, documents in training:
        assert (idx[:, 0] == 256).all()  # packed: a window begins where a document does
        assert torch.equal(documents, (idx == 256).cumsum(1).int())


def test_a_run_begins_from_a_folder(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The cat sat on the mat. Today it rained. " * 40)
    first = train_on_files([text], build_config({**TINY, "tokenizer": "byte"}), tmp_path / "m").model_path
    options = {"init_from": str(first), "max_length": 16, "steps": 1, "learning_rate": 1e-9, "block_size": 40}
    second = train_on_files([text], build_config(options), tmp_path / "m").model_path
    (ours, tokenizer), (theirs, _) = load_folder(second), load_folder(first)
    assert tokenizer.kind == "byte"
    assert (ours.config.n_embd, ours.config.block_size, ours.config.window) == (16, 40, 32)
    torch.testing.assert_close(ours.wpe.weight, theirs.wpe.weight[:40], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.h[0].mlp.c_fc.weight, theirs.h[0].mlp.c_fc.weight, atol=1e-6, rtol=0)
    assert f"on from the weights of `{first.name}`" in (second / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "12M"}, "leave out --preset"),
        ({"n_layer": 3}, "n_layer 1, not 3"),
        ({"max_length": 49}, "longer than --block-size 48"),
        ({"tokenizer": "gpt2"}, "use --tokenizer"),
        ({"init_from": "nowhere"}, "nowhere is no model folder"),
    ],
)
def test_settings_that_the_folder_contradicts(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "t.txt").write_text("The cat sat on the mat. " * 40)
    folder = save_folder(GPT(build_config(TINY).model.gpt_config(257)), byte_tokenizer(), tmp_path, "model")
    with pytest.raises(ValueError, match=message):
        train_on_files(
            [tmp_path / "t.txt"], build_config({"init_from": str(folder), **options}), tmp_path / "m"
        )
    assert not Path("runs").exists()


def test_test_prompts_outside_a_character_vocabulary_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the hens " * 100)
    result = train_on_files([tmp_path / "t.txt"], build_config({**TINY, "tokenizer": "char"}), tmp_path / "m")
    assert list(result.samples) == [""]


def test_nothing_is_left_behind_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(pipeline, "train", fail)
    with pytest.raises(ValueError, match="boom"):
        run_full_pipeline("poems", tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert list(Path("runs").iterdir()) == []


def test_a_model_folder_that_cannot_be_written_loses_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for `create`, which keeps no checkpoint of a finished run; a resume writes the folder."""

    def full(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_folder", full)
        with pytest.raises(
            OSError, match=r"No space left .* weights are in a checkpoint of run: --resume run"
        ):
            run_full_pipeline("poems", tiny(), tmp_path / "a", run_dir=Path("run"))
    result = run_full_pipeline("poems", tiny(), tmp_path / "b", resume=Path("run"))
    whole = run_full_pipeline("poems", tiny(), tmp_path / "c")
    one, other = (load_folder(r.model_path)[0].state_dict() for r in (result, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(Path("run/checkpoints").iterdir())


def test_an_unwritable_output_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline, "collect", None)  # calling it would be a TypeError
    with pytest.raises(OSError, match="cannot write"):
        run_full_pipeline("poems", tiny(), tmp_path / "file")


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = pipeline.train

    def diverged(*args: Any, **options: Any) -> Any:
        return replace(train(*args, **options), final_loss=math.nan, val_loss=math.inf)

    monkeypatch.setattr(pipeline, "train", diverged)
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 99)
    config = build_config({**TINY, "tokenizer": "byte"})
    result = train_on_files([tmp_path / "book.txt"], config, tmp_path / "models")
    text = (result.model_path / "generation_info.json").read_text()
    training = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))["training"]
    assert (training["final_loss"], training["val_loss"]) == (None, None)


def test_samples_reach_the_metrics_and_a_logger(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 99)
    options = {"sample_every": 2, "sample_prompt": ["The"], "logger": ["tensorboard"], "tokenizer": "byte"}
    config = build_config({**TINY, **options})
    run = train_on_files([tmp_path / "book.txt"], config, tmp_path / "models").run_path
    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["sample"][:3]) for row in rows if "sample" in row] == [(2, "The"), (4, "The")]
    (events,) = (run / "tensorboard").iterdir()
    assert b"samples/1" in events.read_bytes()


def test_unknown_generation_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no generation method 'magic'; there are template, ollama, openai"):
        run_full_pipeline("poems", tiny(), tmp_path, "magic")


def test_a_language_model_may_write_the_data(tmp_path: Path) -> None:
    """And what it wrote serves a second run, with no request."""
    with Fake() as fake:
        options = {"llm_host": fake.url, "gen_model": "writer", "refine_model": "grader:7b"}
        config = tiny(steps=1, raw_tokens=700, refined_tokens=400, data_source="ollama", **options)
        result = run_full_pipeline("poems", config, tmp_path)
        asked = len(fake.requests)
        run_full_pipeline("poems", config, tmp_path)
        assert len(fake.requests) == asked
        by_name = run_full_pipeline("poems", config, tmp_path, "template")
    for name in ("generation_info.json", "dataset.json"):
        info = json.loads((result.model_path / name).read_text())
        assert info["generation_method"] == "ollama"
        assert info["generation"]["model"] == "writer"
        assert info["refinement"]["grader"] == "grader:7b"
        assert info["samples_generated"] == info["generation"]["samples"]
    info = json.loads((by_name.model_path / "generation_info.json").read_text())
    assert info["generation_method"] == "template"
    cards = [(one.model_path / "README.md").read_text() for one in (result, by_name)]
    assert "on text that `writer` wrote for the prompt `'poems'`" in cards[0]
    assert "on text that templates wrote for the prompt `'poems'`" in cards[1]
    assert len(list_folders(tmp_path)) == 3  # the folder of the data is none of them


def test_generated_tokens_reach_the_target_and_no_more() -> None:
    texts = generate_texts(Task(prompt="poems", domain="poetry"), 5000)
    lengths = count_gpt2_tokens(texts)
    assert sum(lengths) >= 5000 > sum(lengths[:-1])


def test_text_that_can_be_read_only_once_is_kept_for_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "It was the best of times, it was the worst of times. " * 40
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[json.dumps({"text": text * 2})], daemon=True)
    writer.start()
    config, run = tiny(steps=2, tokenizer="char", keep_last=1), tmp_path / "run"
    first = train_on_files([Path("-"), pipe], config, tmp_path, run_dir=run)
    copies = [str(run / "input-0"), str(run / "input-1.jsonl")]
    assert json.loads((run / "run.json").read_text())["data"] == copies
    config = tiny(steps=3, tokenizer="char", keep_last=1)
    again = train_on_files([*map(Path, copies)], config, tmp_path, resume=run)
    assert (first.summary.steps, again.summary.steps) == (2, 3)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_data_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.txt")
    file.write_text("It was the best of times, it was the worst of times. " * 40)
    config, run = tiny(steps=2, tokenizer="byte", keep_last=1), tmp_path / "run"
    result = train_on_files([file], config, tmp_path, run_dir=run)
    assert json.loads((run / "run.json").read_text())["data"] == [str(file)]
    info = json.loads((result.model_path / "generation_info.json").read_text())
    assert info["data"] == [str(tmp_path / "caf\ufffd.txt")]
    again = train_on_files([file], tiny(steps=3, tokenizer="byte", keep_last=1), tmp_path, resume=run)
    assert again.summary.steps == 3


@pytest.mark.parametrize("prompt", ["recipes", "料理のレシピ"])
def test_transformers_and_gguf_say_what_sample_says(tmp_path: Path, prompt: str) -> None:
    """With the vocabulary that `create` trains by default."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fusedgpt.model.export import export_gguf
    from fusedgpt.model.generate import sample_texts

    path = run_full_pipeline(prompt, tiny(steps=6), tmp_path).model_path
    (gpt, tokenizer), text = load_folder(path), "今日は" if prompt != "recipes" else "Today we make"
    ours = sample_texts(gpt, tokenizer, text, max_new_tokens=16, temperature=0.0)[0]
    export_gguf(gpt, tokenizer, tmp_path / "m.gguf")
    shape = {"config": AutoConfig.from_pretrained(path)}  # which transformers does not read from GGUF
    for folder, options in ((path, {}), (tmp_path, {"gguf_file": "m.gguf"})):
        theirs = AutoModelForCausalLM.from_pretrained(folder, **options, **(shape if options else {}))
        ids_of = AutoTokenizer.from_pretrained(folder, **options)
        ids = ids_of(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == tokenizer.encode(text)
        new = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0]
        assert ids_of.decode(new, skip_special_tokens=True) == ours
