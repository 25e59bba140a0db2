"""Prompts in Japanese: their language, domain, subject and texts."""

import re
from itertools import islice

import pytest

from fusedgpt.train.data.synthetic.check import Checker
from fusedgpt.train.data.synthetic.grammar import DOMAINS, Grammar, choose_domain, generate_samples
from fusedgpt.train.data.synthetic.japanese import choose_language, japanese_topics

PROMPTS = {
    "cooking": "料理のレシピを書くGPT",
    "poetry": "詩を書くGPT",
    "technical": "技術文書を書くGPT",
    "general": "短い物語を書くGPT",
    "conversation": "会話するGPT",
}
ANIMAL_FOOD = (
    r"肉|鶏|豚|牛|ベーコン|ハム|魚|鮭|ツナ|かつお|しらす|卵|バター|チーズ|はちみつ|(?<!ナッ)(?<!ドの)牛乳"
)
WRONG = {
    "unexpanded": r"[{}|]|(?<!\[)#\w",
    "a doubled mark": r"、、|。。|、。|。、",
    "a doubled particle": r"をを|がが|にに(?![んぎ])|はは(?!は)|のの(?!り)",
    "a blank": r"[ \u3000](?=\n|$)",
    "a plain and a polite ending": r"ますます|ですます|ますこと|ですこと",
}


def draw(prompt: str, n: int, seed: int = 0) -> list[str]:
    return list(islice(generate_samples(prompt, seed=seed), n))


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("料理", "ja"),
        ("ﾚｼﾋﾟ", "ja"),
        ("Pythonのチュートリアルを書くGPT", "ja"),
        ("詩を書くGPT", "ja"),
        ("A GPT that writes 俳句", "en"),
        ("🎉", "en"),
        ("", "en"),
        ("recipes", "en"),
    ],
)
def test_language(prompt: str, language: str) -> None:
    assert choose_language(prompt) == language


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_japanese_prompt_chooses_its_domain_and_gets_japanese_texts(domain: str) -> None:
    prompt = PROMPTS[domain]
    assert choose_domain(prompt) == domain
    texts = draw(prompt, 1_500)
    assert len(set(texts)) == len(texts)
    text = "\n\n".join(texts)
    for what, pattern in WRONG.items():
        found = re.search(pattern, re.sub(r"(?s)\n\n(def|counts).*?\n\n", "", text))
        assert not found, f"{what}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"
    if domain != "technical":  # which has code
        assert not re.search(r"[A-Za-z]", re.sub(r"\d(g|ml)", "", text))


@pytest.mark.parametrize("domain", DOMAINS)
def test_they_are_well_formed_and_a_planted_fault_is_not(domain: str) -> None:
    checker = Checker(PROMPTS[domain])
    for text in draw(PROMPTS[domain], 8):
        assert checker.fault(text) is None, text
        middle = text.index("\n", len(text) // 3) if domain == "poetry" else len(text) // 2
        for faulty in (
            text[:middle],
            text[:middle] + "ぬ" + text[middle:],
            text + "。",
            text.replace("は", "わ"),
        ):
            assert faulty == text or checker.fault(faulty), faulty


def test_steps_use_every_ingredient() -> None:
    for text in draw(PROMPTS["cooking"], 500):
        if "作り方\n" not in text:
            continue
        listed, steps = text.split("作り方\n")
        for line in (
            listed.split("人分）\n")[-1]
            .split("個分）\n")[-1]
            .split("枚分）\n")[-1]
            .split("台分）\n")[-1]
            .split("\n")
        ):
            name = line.split("\u3000")[0]
            assert name in steps, f"{name} in:\n{text}"


def test_planted_faults_of_a_recipe() -> None:
    text = next(text for text in draw("カレーのレシピ", 20) if "カレールウ" in text)
    checker = Checker("カレーのレシピ")
    vegetable = re.search(r"人分）\n(.+?)\u3000", text)
    assert vegetable
    first, last = text.index(vegetable[1]), text.rindex(vegetable[1])
    other = "れんこん" if vegetable[1] != "れんこん" else "里芋"
    for place in (first, last):
        wrong = text[:place] + other + text[place + len(vegetable[1]) :]
        fault = checker.fault(wrong)
        assert fault, wrong


@pytest.mark.parametrize(
    ("prompt", "pattern", "least"),
    [
        ("海の詩を書くGPT", "海|波", 0.8),
        ("猫についての俳句", "猫", 0.2),
        ("カレーのレシピ", "カレー", 0.8),
        ("サッカーについて話すGPT", "サッカー", 0.8),
        ("恐竜の物語", "恐竜", 0.8),
        ("Pythonの技術文書", "Python", 0.8),
        ("味噌汁のレシピ", "味噌", 0.8),
    ],
)
def test_the_prompt_steers(prompt: str, pattern: str, least: float) -> None:
    texts = draw(prompt, 200)
    assert sum(bool(re.search(pattern, text)) for text in texts) / len(texts) >= least


def test_vegan() -> None:
    text = re.sub(
        "ココナッツミルク|豆乳|アーモンドミルク", "", "\n".join(draw("ビーガンのお菓子レシピ", 300))
    )
    assert not re.findall(ANIMAL_FOOD, text)


def test_topics() -> None:
    assert japanese_topics("ドラゴンと猫が出てくる物語を書くGPT") == [("ドラゴン", False), ("猫", False)]
    assert japanese_topics("詩を書くGPT") == []


@pytest.mark.parametrize("prompt", ["あ" * 10_000, "詩" * 10_000, "漢字 🎉 Ünïcödé の GPT", "の", "が、を。"])
def test_odd_prompts(prompt: str) -> None:
    assert len(set(draw(prompt, 3))) == 3


def test_every_rule_and_bank_is_reachable_and_renders() -> None:
    for domain in DOMAINS:
        grammar = Grammar(domain, "ja")
        grammar.add_topic("恐竜", frozenset({"恐竜"}), False)
        seen: set[int] = set()
        todo = [grammar.choices["root"]]
        while todo:
            choice = todo.pop()
            if id(choice) not in seen:
                seen.add(id(choice))
                todo += [ref for one in choice.alternatives for ref in one.refs]
        unreached = {name for name, choice in grammar.choices.items() if id(choice) not in seen}
        assert unreached <= {"person", "season", "topic"}, domain
