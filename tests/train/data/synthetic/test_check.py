"""The checker: texts of the templates pass, planted faults are found and named."""

from itertools import islice

import pytest

from fusedgpt.train.data.synthetic.check import Checker
from fusedgpt.train.data.synthetic.grammar import DOMAINS, generate_samples

RECIPE = """Rustic spaghetti with kale
Ingredients:
- spaghetti: 400 g
- kale: 3 cups, torn
- walnuts: 1 handful
- olive oil: 4 tablespoons
- garlic: 3 cloves, thinly sliced
- parsley: 1 bunch
Steps:
1. Bring a large pot of salted water to the boil and cook the spaghetti until it is just firm to the bite. Save a cup of the cooking water.
2. Meanwhile, toast the walnuts in a dry pan until fragrant, then set them aside.
3. Warm the olive oil in the same pan, add the garlic and the kale, and cook gently for 4 minutes.
4. Toss in the spaghetti with a splash of the cooking water until everything is glossy.
5. Finish with the walnuts and the parsley.
It serves two."""  # noqa: E501


@pytest.mark.parametrize("prompt", ["", "carrot soup and dragons"])
@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_of_the_templates_are_well_formed(domain: str, prompt: str) -> None:
    checker = Checker(prompt, domain=domain)
    texts = list(islice(generate_samples(prompt, domain=domain, seed=5), 8))
    assert [fault for text in texts if (fault := checker.fault(text))] == []
    assert checker.share(texts) == 1.0


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("Rustic spaghetti", "Rustic penne", "- "),  # the title does not fit
        ("toast the walnuts", "toast the pecans", "toast the "),  # not among the ingredients
        ("- walnuts: 1 handful\n", "", "torn\\n"),  # not listed
        ("and the kale,", "and the kale, and the kale,", "the kale,"),
        ("400 g", "400 tablespoons", "400 "),
        ("4 tablespoons", "9 tablespoons", "olive oil: "),
        ("4 tablespoons", "4 tablespoon", "4 tablespoon"),
        ("splash", "spalsh", "a sp"),
        ("5. Finish with the walnuts and the parsley.\n", "", "glossy."),
        ("It serves two.", "", "parsley.\\n"),
        ("It serves two.", "It serves two. It serves two.", "serves two."),
    ],
)
def test_planted_faults_are_found_where_they_are(right: str, wrong: str, fault: str) -> None:
    checker = Checker("A GPT that writes recipes")
    assert checker.fault(RECIPE) is None
    found = checker.fault(RECIPE.replace(right, wrong, 1))
    assert found is not None
    assert fault in found.split(" there is ")[0].split(" the text ")[0], found


@pytest.mark.parametrize("domain", DOMAINS)
def test_cut_swapped_and_foreign_texts_are_faulty(domain: str) -> None:
    checker = Checker("", domain=domain)
    for text in islice(generate_samples("", domain=domain, seed=6), 5):
        words = text.split(" ")
        swapped = " ".join([*words[:-2], words[-1], words[-2]])
        for faulty in (text[: len(text) // 2], swapped, text + " " + words[0], text.lower(), "", "Hello."):
            assert checker.fault(faulty), faulty


def test_a_row_is_not_drawn_twice() -> None:
    checker = Checker("", domain="cooking")
    text = "Whole spices keep their scent for a year, ground ones only for a few months. Buy sumac and allspice in small amounts, store them in dark jars, and warm them in a dry pan before you use them. You will smell the moment when they are ready. One minute later they are burnt, so do not walk away."  # noqa: E501
    assert checker.fault(text) is None
    assert checker.fault(text.replace("allspice", "sumac"))
