"""From a prompt to refined texts, by templates or a model: what is kept, recorded, and never recorded."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ollama_fake import Fake, prompt_of, seed_of, varied_text

from fusedgpt.train.data.synthetic.collect import collect, generate_texts, make_texts
from fusedgpt.train.data.synthetic.grammar import choose_domain
from fusedgpt.train.data.synthetic.llm_answer import LLMError
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.data.synthetic.task import Task

PROMPT = "poems about the sea"


def config_for(fake: Fake, **changes: object) -> LLMConfig:
    times = {"connect": 0.5, "generation": 0.5, "grading": 0.5, "interval": 0.01, "total": 20}
    options: dict[str, object] = {f"timeout_{name}": value for name, value in times.items()}
    options |= {
        "data_source": "ollama",
        "llm_host": fake.url,
        "gen_model": "writer",
        "refine_model": "grader:7b",
    }
    return LLMConfig.model_validate({**options, **changes})


def gather(config: LLMConfig, root: Path, notes: list[str] | None = None) -> tuple[list[str], dict[str, Any]]:
    note = (notes if notes is not None else []).append
    task = Task(prompt=PROMPT, domain=choose_domain(PROMPT), seed=3, note=note)
    return collect(task, config, raw_tokens=1500, refined_tokens=700, work_dir=root)


def reply(body: dict[str, Any]) -> str:
    """Every second text is graded as bad."""
    if "Score:" in prompt_of(body):
        return f"Score: {9 if len(prompt_of(body)) % 2 else 2}"
    return varied_text(seed_of(body))


def test_a_prompt_that_templates_know_nothing_of_is_told_what_does(tmp_path: Path) -> None:
    notes: list[str] = []
    for prompt in ("wombat facts", PROMPT):
        task = Task(prompt=prompt, domain=choose_domain(prompt), note=notes.append)
        make_texts(task, LLMConfig(), 100, tmp_path / "samples.jsonl")
    (told,) = (note for note in notes if "know little" in note)
    assert "little of wombat: --data-source" in told


def test_templates_need_no_server(tmp_path: Path) -> None:
    texts, info = gather(LLMConfig(), tmp_path)
    assert info["generation_method"] == "template"
    assert info["samples_generated"] == info["refinement"]["kept"] + sum(
        info["refinement"]["dropped"].values()
    )
    assert 700 <= info["refinement"]["kept_tokens"] < 900
    assert len(texts) == info["refinement"]["kept"]
    assert info["refinement"]["grader"] == "heuristics"
    assert info["generation"]["versions"].keys() == {"fusedgpt"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["ollama", "openai"])
def test_a_model_writes_and_another_grades(tmp_path: Path, source: str) -> None:
    notes: list[str] = []
    with Fake(reply=reply) as fake:
        texts, info = gather(config_for(fake, data_source=source), tmp_path, notes)
        asked = len(fake.requests)
        again = gather(config_for(fake, data_source=source), tmp_path)
        assert len(fake.requests) == asked  # all of it was on disk
    made, refined = info["generation"], info["refinement"]
    assert info["generation_method"] == made["method"] == source
    assert (made["model"], refined["grader"]) == ("writer", "grader:7b")
    assert (made["prompt"], made["domain"], made["server"]) == (PROMPT, "poetry", fake.url)
    assert made["samples"] == info["samples_generated"]
    assert refined["grades"] == {"by the model": made["samples"]}
    assert refined["dropped"]["low score"] > 5
    assert {"started", "seconds", "versions", "rejected", "faults", "requests"} <= made.keys()
    assert made["versions"].keys() == {"fusedgpt", "openai"}
    assert again[0] == texts
    assert again[1]["refinement"]["grades"] == {"from the cache": made["samples"]}
    assert any(f"writer wrote {made['samples']} samples" in note for note in notes)
    assert f"grades: {made['samples']} by the model" in notes


def test_heuristics_may_grade_what_a_model_wrote(tmp_path: Path) -> None:
    with Fake() as fake:
        _, info = gather(config_for(fake, refine_model="heuristics"), tmp_path)
    assert info["refinement"]["grader"] == "heuristics"
    assert "grades" not in info["refinement"]


def test_the_grader_must_be_there_before_anything_is_written(tmp_path: Path) -> None:
    with Fake() as fake:
        with pytest.raises(LLMError, match=r"no model 'absent'; it has .*choose another --refine-model"):
            gather(config_for(fake, refine_model="absent"), tmp_path)
        assert fake.bodies("/v1/chat/completions") == []


def test_nothing_is_said_to_be_kept_where_nothing_is(tmp_path: Path) -> None:
    with Fake(fault=lambda path, number: "500") as fake, pytest.raises(LLMError) as caught:
        gather(config_for(fake), tmp_path)
    assert "kept" not in str(caught.value)


def test_texts_that_are_all_bad_are_an_error(tmp_path: Path) -> None:
    bad = Fake(reply=lambda body: "Score: 1" if "Score:" in prompt_of(body) else varied_text(seed_of(body)))
    with bad as fake, pytest.raises(ValueError, match=r"no text is good enough to be kept: kept 0 of \d+"):
        gather(config_for(fake), tmp_path)


@pytest.mark.parametrize("fault", ["refused", "500", "bad_json"])
def test_without_a_fallback_a_failure_is_an_error(tmp_path: Path, fault: str) -> None:
    with Fake(fault=lambda path, number: fault if number > 6 else None) as fake:
        with pytest.raises(LLMError, match=r"samples .* are kept in .*; run the same command to continue"):
            gather(config_for(fake), tmp_path)
        fake.fault = lambda path, number: None
        _, info = gather(config_for(fake), tmp_path)
    assert "fallback" not in info["generation"]


def test_templates_take_over_where_that_was_asked_for(tmp_path: Path) -> None:
    notes: list[str] = []
    with Fake(fault=lambda path, number: "500" if number > 6 else None) as fake:
        texts, info = gather(config_for(fake, fallback="templates"), tmp_path, notes)
        assert len(fake.bodies("/v1/chat/completions")) < 60
    made = info["generation"]
    assert made["fallback"]["to"] == "templates"
    assert "answers 500" in made["fallback"]["why"]
    assert made["samples"] >= 2
    assert info["samples_generated"] == made["samples"] + made["fallback"]["samples"]
    assert info["refinement"]["grader"] == "heuristics"
    assert sum("falling back to templates" in note for note in notes) == 1
    assert len(texts) > 5


def test_a_server_that_was_never_there(tmp_path: Path) -> None:
    with Fake() as fake:
        pass
    notes: list[str] = []
    _, info = gather(config_for(fake, fallback="templates"), tmp_path, notes)
    assert info["generation"]["samples"] == 0
    assert "no Ollama server answers" in info["generation"]["fallback"]["why"]
    with Fake() as fake:  # the templates' texts are not taken for the model's later
        _, info = gather(config_for(fake), tmp_path)
    assert "fallback" not in info["generation"]
    assert info["generation"]["samples"] == info["samples_generated"]


def test_heuristics_take_over_from_a_grader_that_is_gone(tmp_path: Path) -> None:
    def fault(path: str, number: int) -> str | None:
        graded = sum("Score:" in prompt_of(body) for body in fake.bodies("/v1/chat/completions"))
        return "500" if graded > 9 else None

    notes: list[str] = []
    with Fake(fault=fault) as fake:
        with pytest.raises(LLMError, match="grades so far are kept"):
            gather(config_for(fake), tmp_path)
        _, info = gather(config_for(fake, fallback="templates"), tmp_path, notes)
    grades = info["refinement"]["grades"]
    assert info["refinement"]["fallback"]["to"] == "heuristics"
    assert grades["from the cache"] > 0
    assert grades["by heuristics"] > 0
    assert any("falling back to heuristic grades" in note for note in notes)


def test_the_key_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    notes: list[str] = []

    def tells(body: dict[str, Any]) -> str:
        return "The key sk-secret-1 was sent to me. " + reply(body)

    with Fake(reply=tells) as fake:
        config = config_for(fake, llm_api_key_env="MY_KEY", data_source="openai")
        texts, info = gather(config, tmp_path, notes)
        fake.fault = lambda path, number: "500"
        with pytest.raises(LLMError) as caught:
            make_texts(Task(prompt="x", domain="general"), config, 100, tmp_path / "x.jsonl")
    everything = json.dumps([texts, info, notes, str(caught.value), config.model_dump()])
    everything += "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "sk-secret" not in everything
    assert "MY_KEY" in everything


@pytest.mark.parametrize("source", ["ollama", "openai"])
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, "Bearer {key}"),
        (200, "x" * 52 + "{key}"),  # where the message cuts it
        (200, '{{"error": {{"message": "bad {key}"}}}}'),
        (200, '{{"error": "bad {escaped}"}}'),
        (200, '{{"response": ["{key}"]}}'),
        (200, '{{"choices": [{{"message": {{"content": ["{key}"]}}}}]}}'),
        (401, '{{"error": "bad {key}"}}'),
        (404, '{{"detail": "bad {key}"}}'),
        (500, '{{"error": "' + "x" * 290 + '{key}"}}'),
    ],
)
def test_the_key_is_not_in_what_is_said_of_bad_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, status: int, body: str
) -> None:
    key = "sk-secret-12345"
    monkeypatch.setenv("MY_KEY", key)
    answer = body.format(key=key, escaped=key.replace("s", r"\u0073")).encode() + b"\n"
    notes: list[str] = []
    with Fake(models=("writer", key)) as fake:
        monkeypatch.setattr(
            fake.server.RequestHandlerClass,
            "v1_complete",
            lambda self, _: self.send_raw(status, answer, "a/b"),
        )
        config = config_for(
            fake,
            llm_api_key_env="MY_KEY",
            data_source=source,
            fallback="templates",
            refine_model="heuristics",
        )
        _, info = gather(config, tmp_path, notes)
    everything = json.dumps([info, notes]) + "".join(
        file.read_text() for file in tmp_path.rglob("*") if file.is_file()
    )
    assert "falling back" in everything
    assert "sk-secr" not in everything


def test_a_key_like_none_leaves_texts_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "salt")
    one_by_one = {"refine_model": "heuristics", "llm_concurrency": 1}  # else what is kept depends on timing
    with Fake(reply=reply) as fake:
        texts, _ = gather(config_for(fake, **one_by_one), tmp_path / "a")
        again, _ = gather(config_for(fake, llm_api_key_env="MY_KEY", **one_by_one), tmp_path / "b")
    assert any("salt" in text for text in texts)
    assert sorted(again)[:3] == sorted(texts)[:3]


def test_the_total_time_counts_generation_and_grading_together(tmp_path: Path) -> None:
    """Writing takes some of it, grading never ends: together they stop in time."""

    def fault(path: str, number: int) -> str | None:
        body = fake.requests[-1][2]
        return "slow" if "Score:" in prompt_of(body) else None

    with Fake(fault=fault, delay=0.02) as fake:
        config = config_for(fake, timeout_total=1.5, timeout_grading=10)
        with pytest.raises(LLMError, match=r"the time is over \(--timeout-total 1.5 seconds\)"):
            gather(config, tmp_path)


def test_an_exhausted_model_is_told_from_a_failing_one(tmp_path: Path) -> None:
    one = Fake(reply=lambda body: "The sea is wide and the sky is wider, and I am small.")
    with one as fake, pytest.raises(LLMError, match=r"4\d answers in a row .*so far: 4\d duplicate"):
        gather(config_for(fake), tmp_path)
    with Fake(reply=lambda body: "") as fake, pytest.raises(LLMError, match=r"so far: 4\d empty"):
        gather(config_for(fake), tmp_path / "other")


def test_progress_is_shown(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def bar(title: str) -> Any:
        seen[title] = []
        yield lambda done, total: seen[title].append((done, total))

    with Fake(reply=reply) as fake:
        task = Task(prompt=PROMPT, domain="poetry", bar=bar)
        collect(task, config_for(fake), raw_tokens=500, refined_tokens=300, work_dir=tmp_path)
    assert seen.keys() == {"writing", "grading"}
    for steps in seen.values():
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
        assert steps == sorted(steps)


def test_generated_tokens_reach_the_target_and_no_more() -> None:
    assert len(generate_texts(Task(prompt="poems", domain="poetry"), 1)) == 1
    assert generate_texts(Task(prompt="poems", domain="poetry"), 0) == []


def test_a_model_without_the_extra_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And templates do without it."""
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "fusedgpt.train.data.synthetic.llm", raising=False)
    with (
        Fake() as fake,
        pytest.raises(ValueError, match=r"package openai: .*python.* -m pip install 'fusedgpt"),
    ):
        gather(config_for(fake), tmp_path)
    assert gather(LLMConfig(), tmp_path)[0]
