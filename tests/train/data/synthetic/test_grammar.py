"""The template generator: determinism, variety, steering by the prompt, grammar of the texts."""

import math
import os
import re
import subprocess
import sys
import time
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.train.data.synthetic import grammar as generate
from fusedgpt.train.data.synthetic.grammar import DOMAINS, choose_domain, generate_samples, unknown_words
from fusedgpt.train.data.synthetic.parts import Alternative, Choice, Run
from fusedgpt.train.data.synthetic.words import article, plural, read_templates, stem

# What a vegan may have although it sounds otherwise: peanut butter, coconut milk.
PLANT_FOOD = re.compile(r"(peanut|almond|coconut|oat|soy|rice) (butter|milk|yogurt)|butter beans?", re.I)
ANIMAL_FOOD = re.compile(r"\b(butter|eggs?|milk|cream|honey|cheese|yogurt|chicken|beef|fish|shrimp)\b", re.I)
PROMPTS = ["", "dragons", "vegan desserts, football and the sea"]


def draw(prompt: str, domain: str | None = None, n: int = 400, seed: int = 0) -> list[str]:
    return list(islice(generate_samples(prompt, domain=domain, seed=seed), n))


def share(pattern: str, samples: list[str]) -> float:
    return sum(bool(re.search(pattern, text, re.I)) for text in samples) / len(samples)


@pytest.mark.parametrize(
    ("prompt", "domain"),
    [
        ("vegan desserts", "cooking"),
        ("A GPT that writes recipes", "cooking"),
        ("おいしい料理のレシピ", "cooking"),
        ("a poem about the sea", "poetry"),
        ("a poem about cooking", "poetry"),
        ("海の詩", "poetry"),
        ("PYTHON programming", "technical"),
        ("explain how databases work", "technical"),
        ("プログラムの技術", "technical"),
        ("talk about football", "conversation"),
        ("a conversation about programming", "conversation"),
        ("会話", "conversation"),
        ("ﾁｬｯﾄ", "conversation"),  # half-width, so NFKC matters
        ("short stories about dragons", "general"),
        ("物語", "general"),
        ("A fun GPT that writes about space", "general"),
        ("", "general"),
        ("🎉🎉", "general"),
    ],
)
def test_domain_choice(prompt: str, domain: str) -> None:
    assert choose_domain(prompt) == domain


def test_a_tie_goes_to_the_word_that_comes_first() -> None:
    assert choose_domain("recipes, poems") == "cooking"
    assert choose_domain("poems, recipes") == "poetry"


@given(st.text(max_size=200))
@settings(max_examples=25, deadline=None)
def test_no_prompt_fails(prompt: str) -> None:
    assert choose_domain(prompt) in DOMAINS


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("quantum computing for kids", ["quantum", "kids"]),
        ("A GPT that writes Python code", ["code"]),
        ("wombat facts", ["wombat"]),
        ("A fun GPT that writes cooking recipes", []),
        ("Bedtime stories about dragons", []),  # a story can be about anything
        ("詩を書くGPT", []),
        ("", []),
    ],
)
def test_what_templates_cannot_write_is_known(prompt: str, unknown: list[str]) -> None:
    assert unknown_words(prompt) == unknown
    assert next(generate_samples(prompt, domain="poetry"))


@pytest.mark.parametrize(
    "prompt", ["x" * 10_000, "no salt " * 2_000, "🎉" * 10_000, "\ud800", "without the a"]
)
def test_hostile_prompts(prompt: str) -> None:
    assert len(set(draw(prompt, n=3))) == 3


def test_a_prompt_that_rules_out_everything_is_answered_all_the_same() -> None:
    prompt = "no dish, no sweet, no recipe, no advice, no memory"
    assert not generate._steered(prompt, "cooking", "en", generate._excluded(prompt, {})).allowed
    assert len(set(draw(prompt, "cooking", n=5))) == 5


def test_unknown_domain() -> None:
    with pytest.raises(ValueError, match="'sports'"):
        generate_samples("football", domain="sports")


def test_same_sequence_in_every_process() -> None:
    code = (
        "from itertools import islice\n"
        "from fusedgpt.train.data.synthetic.grammar import DOMAINS, generate_samples\n"
        "for d in DOMAINS: print(*islice(generate_samples('carrot soup and dragons', domain=d), 20))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(runs) == 1
    assert len(runs.pop()) > 10_000


def test_seed_and_prompt_change_the_sequence() -> None:
    assert len({tuple(draw(p, "general", 3, seed=s)) for p in ("dogs", "cats") for s in (0, 1)}) == 4


def derivations(choice: Choice, memo: dict[int, int]) -> int:
    """How many ways lead through a choice; numbers and fields are left out, so the count is low."""
    if id(choice) not in memo:
        memo[id(choice)] = sum(
            1 if len(one.fields) > 1 else math.prod(derivations(ref, memo) for ref in one.refs)
            for one in choice.alternatives
        )
    return max(1, memo[id(choice)])


@pytest.mark.parametrize("domain", DOMAINS)
def test_more_than_a_hundred_thousand_samples(domain: str) -> None:
    root = generate.Grammar(domain).choices["root"]
    root.steer(frozenset(), frozenset())
    assert derivations(root, {}) > 1_000_000
    rng = generate.Random(0)
    # Of 100,000 equally likely texts, 5,000 draws would repeat about 120.
    raw = [root.write(Run(rng)) for _ in range(5_000)]
    assert len(raw) - len(set(raw)) < 120


@pytest.mark.parametrize("domain", DOMAINS)
def test_stream_has_no_repeats(domain: str) -> None:
    samples = draw("", domain, 5_000)
    assert len(set(samples)) == len(samples)


def test_used_up_texts_may_come_again() -> None:
    one = Alternative(fields={"": ["only"]}, tags=frozenset(), words=frozenset(), refs=[])
    root = Choice([one], True)
    root.steer(frozenset(), frozenset())
    assert list(islice(generate._stream(root, generate.Random(0)), 3)) == ["only"] * 3


@pytest.mark.parametrize(
    ("prompt", "domain", "pattern", "least"),
    [
        (
            "vegan desserts",
            None,
            r"Sorbet|Cake|Cookies|Muffin|Crumble|Truffle|dessert|Fruit|Pudding|Tart|Bites|Baked|Smoothie|Shake|lemonade",
            0.8,
        ),
        ("carrot soup", None, r"soup", 0.8),
        ("carrot soup", None, r"carrot", 0.8),
        ("a poem about the sea", None, r"\b(sea|waves?|gulls?|shore|harbor|tide|shell)", 0.9),
        ("haiku about winter", None, r"snow|winter|frost|ice|breath|cold|smoke|bare", 0.9),
        ("python programming", None, r"Python", 0.85),
        ("talk about football", None, r"football", 0.85),
        ("zeppelins", "general", r"zeppelins", 0.8),
        ("a chatbot that loves zeppelins", None, r"zeppelins", 0.8),
        ("a poem about a brave wombat", None, r"brave wombats", 0.8),
        ("quantum computers", None, r"quantum computers", 0.8),
        ("how clocks work", None, r"\bclocks\b(?! work)", 0.8),
        ("recipes for okra soup", None, r"okra", 0.8),
        ("Write something about Japan", None, r"Japan", 0.8),
    ],
)
def test_prompt_steers(prompt: str, domain: str | None, pattern: str, least: float) -> None:
    assert share(pattern, draw(prompt, domain)) >= least


OPENING_PROMPTS = {
    "cooking": "A fun GPT that writes cooking recipes",
    "poetry": "a poem about the sea",
    "technical": "python programming help",
    "general": "general stories about travel",
    "conversation": "friendly conversation",
}


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_begin_with_today_and_the(domain: str, steered: bool) -> None:
    """A tiny model can go on from the prompts "Today" and "The" only where the samples show it how."""
    samples = draw(OPENING_PROMPTS[domain] if steered else "", domain)
    for word, least in (("Today", 0.15), ("The", 0.25)):
        # At the start of a line, of a sentence, of a quotation or of a speaker's turn.
        assert share(rf"(?-i:(?:^|\n|[.!?:]\"? )\"?{word} )", samples) >= least
    assert sum(text.startswith("Today ") for text in samples) / len(samples) >= 0.1
    assert sum(text.startswith("The ") for text in samples) / len(samples) >= 0.05


def test_without_prompt_no_subject_dominates() -> None:
    assert share(r"\bsea\b", draw("", "poetry")) < 0.4


@pytest.mark.parametrize(
    "prompt", ["vegan desserts", "ビーガンのお菓子", "plant-based dinner", "vegan pancakes with honey"]
)
def test_vegan(prompt: str) -> None:
    text = PLANT_FOOD.sub("", "\n".join(draw(prompt, "cooking", 1_000)))
    assert ANIMAL_FOOD.findall(text) == []


@pytest.mark.parametrize(
    ("prompt", "pattern"),
    [
        ("vegetarian dinners", r"\b(chicken|beef|pork|lamb|salmon|shrimp|sausages?|turkey|cod|trout)\b"),
        ("gluten-free recipes", r"\b(flour|pasta|spaghetti|bread|bulgur|couscous|seitan)\b"),
        ("recipes without garlic", r"\bgarlic\b"),
        ("nut-free cookies", r"\b(walnuts?|almonds?|hazelnuts?|cashews?|peanuts?|pecans?)\b"),
    ],
)
def test_exclusions(prompt: str, pattern: str) -> None:
    text = re.sub(r"chickpea flour|lamb's lettuce", "", "\n".join(draw(prompt, "cooking", 1_000)), flags=re.I)
    assert re.findall(pattern, text, re.I) == []
    assert re.search(pattern, "\n".join(draw("", "cooking", 400)), re.I)


def ingredients(recipe: str) -> list[str]:
    """The last word of each ingredient's name: "- sweet potatoes: 3, peeled" -> potatoes."""
    lines = recipe.split("Ingredients:\n")[1].split("\nSteps:")[0].split("\n")
    return [line.split(":")[0].split()[-1] for line in lines]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_steps_use_every_ingredient(prompt: str) -> None:
    recipes = [text for text in draw(prompt, "cooking", 2_000) if "\nSteps:" in text]
    assert len(recipes) > 1_000
    for recipe in recipes:
        steps = {stem(word) for word in re.findall(r"[\w'-]+", recipe.split("\nSteps:\n")[1])}
        missing = [one for one in ingredients(recipe) if stem(one) not in steps]
        assert not missing, f"{missing} in:\n{recipe}"


def test_ingredients_are_distinct() -> None:
    for recipe in draw("", "cooking", 2_000):
        if "\nSteps:" in recipe:
            lines = recipe.split("Ingredients:\n")[1].split("\nSteps:")[0].split("\n")
            assert len(set(lines)) == len(lines), recipe


WRONG = {
    "article before a vowel": r"\b[Aa] (?!uni|one|eu|use)[aeiouAEIOU]\w+",
    "article before a consonant": r"\b[Aa]n (?!hour|honest|[A-Z]{2})[^aeiouAEIOU\W]\w*",
    "one with a plural": r"\b1 (?:\w+ )?(?:cups|cans|tablespoons|minutes|hours|cloves|eggs|days|years)\b",
    "a number with a singular": r"\b(?:[2-9]|\d\d+) (?:cup|can|tablespoon|minute|hour|clove|egg|day|year)\b",
    "unexpanded": r"[{}]|\\[\[\]]|#\w|\b[a-z]\.[a-z]\w+\b(?<!\.id)(?<!\.txt)",
    "doubled word": r"\b(\w+) \1\b(?<!well)",
    "space before a mark": r"\w [,;:?!]| \.(?! \|)",
    "doubled mark": r",,|;;|\.\.|,\.|\.,",
    "sentence without a capital": r"\w\w[.?] [a-z]",
    "trailing blank": r"[ \t](?:\n|$)",
    "plural with a singular verb": r"\b(?:carrots|potatoes|chickpeas|dragons|apples) (?:is|has|was|does)\b",
    "singular with a plural verb": r"[.!?] (?:The (?:rice|tofu|sea)|Football) (?:are|have|were|do)\b",
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_grammar(domain: str, prompt: str) -> None:
    text = "\n\n".join(draw(prompt, domain, 1_500))
    for what, pattern in WRONG.items():
        found = re.search(pattern, text)
        assert not found, f"{what}: {text[max(0, found.start() - 60) : found.end() + 60]!r}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_length_and_opening(domain: str) -> None:
    samples = draw("dragons", domain, 1_000)
    mean = sum(map(len, samples)) / len(samples)
    assert 160 <= mean <= 640  # about 40 to 160 tokens
    if domain not in ("cooking", "poetry"):
        assert all(text[0].isupper() or text[0] in "\"'[" for text in samples)


@pytest.mark.parametrize(
    ("word", "with_article"),
    [
        ("hour", "an hour"),
        ("university", "a university"),
        ("egg", "an egg"),
        ("one-pot meal", "a one-pot meal"),
        ("uninvited guest", "an uninvited guest"),
        ("SQL query", "an SQL query"),
        ("GPU", "a GPU"),
        ("API", "an API"),
        ("European city", "a European city"),
        ("umbrella", "an umbrella"),
        ("house", "a house"),
    ],
)
def test_article(word: str, with_article: str) -> None:
    assert article(word) == with_article


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("leaf", "leaves"),
        ("ripe tomato", "ripe tomatoes"),
        ("knife", "knives"),
        ("werewolf", "werewolves"),
        ("superhero", "superheroes"),
        ("child", "children"),
        ("radish", "radishes"),
        ("cherry", "cherries"),
        ("day", "days"),
        ("clove of garlic", "cloves of garlic"),
        ("loaf of bread", "loaves of bread"),
    ],
)
def test_plural(one: str, many: str) -> None:
    assert plural(one) == many


@pytest.mark.parametrize("word", ["cake", "story", "cookie", "dessert", "leaf", "potato", "dish", "sandwich"])
def test_stem_is_the_same_for_the_plural(word: str) -> None:
    assert stem(word) == stem(plural(word))


def test_stem_is_the_same_for_verb_forms() -> None:
    assert len({stem(word) for word in ("cook", "cooks", "cooked", "cooking", "Cooking")}) == 1
    assert len({stem(word) for word in ("bake", "bakes", "baked", "baking")}) == 1


def walk(choice: Choice, seen: set[int]) -> None:
    if id(choice) not in seen:
        seen.add(id(choice))
        for one in choice.alternatives:
            for ref in one.refs:
                walk(ref, seen)


def test_every_rule_and_bank_is_reachable() -> None:
    reached: set[str] = set()
    for domain in DOMAINS:
        grammar = generate.Grammar(domain)
        seen: set[int] = set()
        walk(grammar.choices["root"], seen)
        unreached = {name for name, choice in grammar.choices.items() if id(choice) not in seen}
        assert unreached <= set(read_templates("shared").get("banks", {}))
        reached |= grammar.choices.keys() - unreached
    assert set(read_templates("shared")["banks"]) <= reached


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_alternative_renders(domain: str) -> None:
    """Renders each alternative of the root's rules, so that a misspelt name or field cannot hide."""
    grammar = generate.Grammar(domain)
    grammar.add_topic("dragons", frozenset({"dragon"}), True)
    root = grammar.choices["root"]
    root.steer(frozenset(), frozenset())
    for one in root.alternatives:
        for form in one.refs[0].alternatives:
            for seed in range(12):
                assert Run(generate.Random(seed)).join(form.fields[""])


@pytest.mark.parametrize("bad", ["[a|b", "a]", "{a b c}", "{"])
def test_malformed_templates_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="template"):
        generate.Grammar("poetry")._alternative(bad, None)


def test_a_row_with_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 fields, not 2"):
        generate.Grammar("poetry")._alternative("carrots", ["name", "line"])


def test_speed() -> None:
    read_templates.cache_clear()
    start, n = time.perf_counter(), 0
    for text in generate_samples("carrot soup", domain="cooking"):
        n += len(text)
        if n > 430_000:  # characters of 100k GPT-2 tokens
            break
    assert time.perf_counter() - start < 2.0


def test_import_needs_no_torch() -> None:
    code = "import sys, fusedgpt.train.data.synthetic.grammar; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
