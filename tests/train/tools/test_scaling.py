"""What several cards are predicted to make of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedgpt.model.config import PRESETS
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.tools.scaling import CARDS, LINKS, scale, table

H100 = "NVIDIA H100 80GB HBM3"
TRAIN = TrainConfig(batch_size=16, batch_tokens=64 * 1024, precision="bf16")


def test_bytes_times_and_speed_up_by_hand() -> None:
    """GPT-2 124M: 4 bytes of each parameter's gradient, twice over the wire, less a card's own part."""
    config, n = PRESETS["gpt2"], 124_439_808
    rows = {(row.cards, row.link): row for row in scale(config, TRAIN, 1024, H100)}
    assert [cards for cards, _ in rows] == [2, 2, 4, 4, 8, 8, 16, 32, 64]
    four = rows[4, "PCIe"]
    assert four.sent == pytest.approx(2 * 3 / 4 * 4 * n)
    assert four.sending == pytest.approx(four.sent / LINKS["PCIe"])
    assert four.alone is not None
    assert four.hidden == pytest.approx(2 / 3 * four.alone / 4)  # one micro-batch of 16 windows a card
    assert four.seconds == pytest.approx(four.alone / 4 + four.sending - four.hidden)
    assert rows[8, "NVLink"].speedup == pytest.approx(8.0)
    two_machines = rows[16, "network"]
    within = 2 * 7 / 8 * 4 * n / LINKS["NVLink"]
    assert two_machines.sending == pytest.approx(within + 2 * 1 / 2 * 4 * n / LINKS["network"])


def test_what_does_not_fit_is_sharded() -> None:
    """Each micro-batch gathers twice and reduces once; more cards hold less each."""
    config = PRESETS["gpt2-xl"]
    train = TRAIN.model_copy(update={"batch_size": 4})
    rows = {(row.cards, row.link): row for row in scale(config, train, 1024, H100, card_bytes=20e9)}
    assert {row.parallel for row in rows.values()} == {"fsdp"}
    assert rows[2, "NVLink"].memory > rows[8, "NVLink"].memory > rows[64, "network"].memory
    assert rows[8, "PCIe"].sent == pytest.approx(2 * 3 * 7 / 8 * 4 * 1_557_611_200, rel=1e-3)
    assert {row.parallel for row in scale(config, train, 1024, H100)} == {"ddp"}


def test_cards_that_do_not_divide_the_step_are_left_out_and_an_unknown_card_has_no_times() -> None:
    config = PRESETS["12M"]
    train = TrainConfig(batch_size=12, precision="fp32")
    rows = scale(config, train, 512, "cpu")
    assert {row.cards for row in rows} == {2, 4} < set(CARDS)
    for cells in table(rows):
        assert cells["sent a step"].endswith(" GB")
        assert not cells["speed-up"]


@pytest.mark.parametrize(
    ("row", "preset", "batch_size"),
    [("124M", "gpt2", 16), ("355M", "gpt2-medium", 16), ("774M", "gpt2-large", 8), ("1.5B", "gpt2-xl", 8)],
)
def test_the_table_in_the_docs_is_what_is_predicted(row: str, preset: str, batch_size: int) -> None:
    text = (Path(__file__).parents[3] / "docs/distributed.md").read_text()
    found = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    train = TrainConfig(batch_size=batch_size, batch_tokens=524_288, precision="bf16")
    rows = {(row.cards, row.link): row for row in scale(PRESETS[preset], train, 1024, H100)}
    order = [(2, "NVLink"), (4, "NVLink"), (8, "NVLink"), (8, "PCIe")] + [
        (n, "network") for n in (16, 32, 64)
    ]
    seconds = [rows[2, "NVLink"].alone, *(rows[key].seconds for key in order)]
    assert found.split("|")[2:-1] == [f" {524.288 / s:,.0f} " for s in seconds if s is not None]
