"""Requests that differ, answers taken apart, samples kept, and a run that goes on where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.train.data.synthetic.grammar import DOMAINS, choose_domain
from fusedgpt.train.data.synthetic.llm_answer import Answer
from fusedgpt.train.data.synthetic.llm_config import LLMConfig
from fusedgpt.train.data.synthetic.llm_generate import SampleFile, request_text, split_answer
from fusedgpt.train.data.synthetic.task import Task, count_gpt2_tokens

SOUP = "Chop two onions and fry them slowly in butter. Add the stock and simmer for an hour."
CAKE = "Beat four eggs with sugar until pale, fold in the flour, and bake until golden."
CONFIG = LLMConfig(data_source="ollama", gen_model="writer")


def split(text: str, ended: bool = True) -> list[str]:
    return split_answer(Answer(text, ended))


@pytest.mark.parametrize("domain", DOMAINS)
def test_requests_differ(domain: str) -> None:
    texts = [request_text("tales of the sea", domain, 0, n) for n in range(100)]
    assert len(set(texts)) > 97
    assert all("tales of the sea" in text for text in texts)
    assert texts[7] == request_text("tales of the sea", domain, 0, 7)
    assert texts[7] != request_text("tales of the sea", domain, 1, 7)
    lengths = {length for length in ("40 to 80", "80 to 150", "150 to 250") for t in texts if length in t}
    assert len(lengths) == 3
    assert len({text.split("Each text: ")[1].split(",")[0] for text in texts}) == 4


@pytest.mark.parametrize(
    "prompt", ["詩を書くGPT", "料理のレシピ", "楽しい会話", "物語を書く", "プログラミングの説明"]
)
def test_requests_in_japanese_differ_by_japanese_words(prompt: str) -> None:
    texts = [request_text(prompt, choose_domain(prompt), 0, n) for n in range(50)]
    sparks = [text.split("Somewhere in them: ")[1].split(". Write in Japanese.")[0] for text in texts]
    assert len(set(sparks)) > 45
    assert not any(word.isascii() for pair in sparks for word in pair.split(" and "))


@pytest.mark.parametrize("prompt", ["", "\x1b[31m\x00", "x" * 100_000, "料理のレシピ", "\ud800"])
def test_requests_for_odd_prompts(prompt: str) -> None:
    text = request_text(prompt, "general", 0, 0)
    assert len(text) < 4_000
    text.encode()
    assert "\x1b" not in text


@pytest.mark.parametrize(
    "answer",
    [
        f"{SOUP}\n===\n{CAKE}",
        f"Sure! Here are two recipes:\n\n{SOUP}\n\n=====\n\n{CAKE}\n\nI hope this helps!",
        f"Sure, here is your text: {SOUP}\n===\nHere's another one: {CAKE}",
        f"Certainly!\n\nRecipe 1:\n{SOUP}\n\n**Recipe 2**\n\n{CAKE}\n\nLet me know if you want more.",
        f"### Text 1\n{SOUP}\n### Text 2\n{CAKE}",
        f"{SOUP}\n\n---\n\n{CAKE}\n---",
        f"```\n{SOUP}\n```\n===\n```text\n{CAKE}\n```",
        f'"{SOUP}"\n===\n"{CAKE}"',
        f"<think>\nThe user wants ===\nrecipes.\n</think>\n{SOUP}\n===\n{CAKE}<|im_end|>",
        f"\x1b[1m{SOUP}\x1b[0m\r\n===\r\n{CAKE}\x07",
        f"===\n{SOUP}  \n===\n===\n\t{CAKE}\n===",
    ],
)
def test_answers_come_apart(answer: str) -> None:
    assert split(answer) == [SOUP, CAKE]


THOUGHT = "Okay, the user wants two recipes.\n===\nLet me think about eggs first."


@pytest.mark.parametrize(
    "thought",
    [
        f"{THOUGHT}\n</think>\n\n",  # DeepSeek-R1 and QwQ: the chat template opens the tag
        f"<think>{THOUGHT}</think>",
        f"<thinking>{THOUGHT}</thinking>",
        f"<Thought>{THOUGHT}</Thought>",
        f"<reasoning>{THOUGHT}</reasoning>",
        f"<seed:think>{THOUGHT}</seed:think>",
        f"[THINK]{THOUGHT}[/THINK]",
        f"◁think▷{THOUGHT}◁/think▷",
        f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>",
        f"<|START_THINKING|>{THOUGHT}<|END_THINKING|><|START_RESPONSE|>",
        f"<think>{THOUGHT} I close it with </think> later.</think>",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I write.<|end|><|start|>assistant<|channel|>final <|constrain|>text<|message|>",
        f"analysis{THOUGHT}assistantfinal",
        f"<think>{THOUGHT}</think><answer>",
    ],
)
def test_thoughts_are_dropped(thought: str) -> None:
    assert split(f"{thought}{SOUP}\n===\n{CAKE}") == [SOUP, CAKE]


@pytest.mark.parametrize(
    "answer",
    [
        f"<|channel|>analysis<|message|>{THOUGHT}",
        f"analysis{THOUGHT}",
        f"[THINK]{THOUGHT}",
        f"<seed:think>{THOUGHT}",
        THOUGHT.split("\n")[0],  # without a tag, as the server has cut the answer before it
        "Hmm, well, we need to write three recipes with eggs, each of them different.",
        "So, let's think: a recipe of eggs, one of soup and one of bread would do.",
    ],
)
def test_answers_that_are_only_thoughts_are_refused_and_counted(tmp_path: Path, answer: str) -> None:
    with open_samples(tmp_path / "s.jsonl") as samples:
        assert samples.take(0, Answer(answer, False)) == 0
        assert sum(samples.rejected[reason] for reason in ("empty", "thoughts")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Here is the thing about bread: it takes time, and most of us have none.",
        "Okay, she said, and shut the door behind her. Nobody spoke for a while.",
        "Sam: Are you coming tonight?\nJo: Let me know when you arrive.",
        "Great cooks salt early.\nThe others wonder why it is bland.",
        "The recipe:\n\n1. Wash the rice.\n2. Boil it.",
        'He said "no" and she said "yes".',
        "Of course the sea was cold that morning.\nWe went in all the same.",
        "Sam: [thinking] I am not sure. Let me think about it.",
        "The users wanted more <b>reasoning</b>, and an analysis of the final channel.",
    ],
)
def test_sound_texts_are_left_as_they_are(text: str) -> None:
    assert split(text) == [text]


def test_an_answer_that_was_cut_ends_with_a_whole_sentence() -> None:
    assert split(f"{SOUP}\n===\n{CAKE} Then take the", ended=False) == [SOUP, CAKE]
    assert split(f"{SOUP}\n===\nThen take the", ended=False) == [SOUP]
    assert split("Then take the", ended=False) == []
    assert split("<think>hmm", ended=False) == []


@given(st.text(st.characters(), max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_answer_comes_apart(text: str, ended: bool) -> None:
    for part in split(text, ended):
        assert part.strip() == part != ""
        part.encode()
        assert all(c.isprintable() or c in "\n\t" or ord(c) > 0x9F for c in part)


HOSTILE = [
    "<|channel|>",
    "<|channel|>final",
    "[THINK]",
    "<seed:",
    " ",
    "\n",
    "=",
    "= ",
    "- ",
    "*",
    "_",
    "`",
    "<think>",
    "</think>",
    "<|",
    "\x1b[",
    '"',
    "Sure, ",
    "a.",
    ". ",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_answers_take_no_time(unit: str) -> None:
    started = time.perf_counter()
    split(unit * 100_000 + "x")
    split("x" + unit * 100_000)
    assert time.perf_counter() - started < 2


def open_samples(
    path: Path, config: LLMConfig = CONFIG, *, prompt: str = "soups", seed: int = 0
) -> SampleFile:
    return SampleFile(Task(prompt=prompt, domain="cooking", seed=seed), config, 100, path)


def test_what_is_taken_and_what_is_not(tmp_path: Path) -> None:
    with open_samples(tmp_path / "s.jsonl") as samples:
        assert samples.take(0, Answer(f"{SOUP}\n===\n{CAKE}", True)) == 2
        on_disk = (tmp_path / "s.jsonl").read_text()
        assert on_disk.count("\n") == 2  # at once
        assert samples.take(1, Answer(SOUP.upper(), True)) == 0
        assert samples.take(2, Answer(SOUP.replace("an hour", "two hours"), True)) == 0
        assert samples.take(3, Answer("I'm sorry, but I can't help with such a request today.", True)) == 0
        assert samples.take(4, Answer("Too short.", True)) == 0
        assert samples.take(5, Answer(" \n", True)) == 0
        assert samples.take(6, Answer("word " * 5000, True)) == 0
        report = samples.report()
    rejected = {"duplicate": 1, "near-duplicate": 1, "refusal": 1, "too short": 1, "empty": 1, "too long": 1}
    assert report["rejected"] == rejected
    assert (report["samples"], report["tokens"]) == (2, sum(count_gpt2_tokens([SOUP, CAKE])))
    assert json.loads((tmp_path / "s.info.json").read_text()) | {"seconds": 0} == report | {"seconds": 0}


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with open_samples(path) as samples:
        samples.requests = 4
        samples.take(3, Answer(SOUP, True))
        samples.take(2, Answer("Too short.", True))
    with path.open("a") as file:
        file.write('{"text": "' + CAKE[:20])  # a kill in the midst of a write
    with open_samples(path) as samples:
        assert samples.texts == [SOUP]
        assert (samples.requests, samples.tokens) == (4, *count_gpt2_tokens([SOUP]))
        assert samples.rejected == {"too short": 1}
        assert samples.take(4, Answer(f"{SOUP}\n===\n{CAKE}", True)) == 1
        assert samples.report()["runs"] == 2
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == [SOUP, CAKE]


def test_the_number_of_requests_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    samples = open_samples(path)
    samples.take(41, Answer(SOUP, True))
    samples.file.close()  # the info file is as old as the start
    with open_samples(path) as samples:
        assert samples.requests == 42


@pytest.mark.parametrize(
    ("prompt", "seed", "model"), [("stews", 0, "writer"), ("soups", 1, "writer"), ("soups", 0, "other")]
)
def test_a_file_for_another_purpose_is_refused(tmp_path: Path, prompt: str, seed: int, model: str) -> None:
    path = tmp_path / "s.jsonl"
    with open_samples(path) as samples:
        samples.take(0, Answer(SOUP, True))
    before = path.read_bytes()
    config = CONFIG.model_copy(update={"gen_model": model})
    with pytest.raises(ValueError, match="was made for 'soups' with writer, seed 0; another prompt"):
        open_samples(path, config, prompt=prompt, seed=seed)
    assert path.read_bytes() == before


def test_a_foreign_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "mine"}\nand a last line without an end')
    with pytest.raises(ValueError, match=r"notes.jsonl exists, and no notes.info.json says what it is for"):
        open_samples(path)
    assert path.read_text() == '{"text": "mine"}\nand a last line without an end'
    for damage in ("", "[]", "5", "{}", "{"):
        path.with_suffix(".info.json").write_text(damage)
        with pytest.raises(ValueError, match=r"info.json is damaged; remove it together with"):
            open_samples(path)


def test_a_run_without_a_sample_leaves_no_file(tmp_path: Path) -> None:
    """So that the next may be with another model."""
    path = tmp_path / "s.jsonl"
    with open_samples(path) as samples:
        samples.take(0, Answer("Too short.", True))
    assert [file.name for file in tmp_path.iterdir()] == [".s.jsonl.lock"]
    with open_samples(path, CONFIG.model_copy(update={"gen_model": "other"})) as samples:
        samples.take(0, Answer(SOUP, True))
    assert json.loads(path.with_suffix(".info.json").read_text())["model"] == "other"
