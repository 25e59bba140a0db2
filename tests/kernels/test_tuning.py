"""Tiles: the tables, the file of measured ones, and the search that writes it."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedgpt.kernels import tuning
from fusedgpt.kernels.tools import tune
from fusedgpt.kernels.tuning import Tile

Q = torch.empty(1, 4, 2, 64, dtype=torch.bfloat16)
SMALL = Tile(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0)])
@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("D", [16, 64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_gpu_has_a_tile(capability: tuple[int, int], kernel: str, D: int, dtype: torch.dtype) -> None:
    q = torch.empty(1, 4, 2, D, dtype=dtype)
    with tuning.assume_capability(capability):
        for feature in ("plain", "documents", "dropout"):
            for describable in (False, True):
                tile = tuning.attention(kernel, q, feature=feature, describable=describable)
                may_describe = describable and capability[0] in (9, 10) and dtype == torch.bfloat16
                assert tile.descriptors == may_describe


def test_hopper_has_tiles_of_its_own() -> None:
    q, tiles = Q.repeat(1, 100, 1, 1), {}
    for capability in ((9, 0), (8, 9)):
        with tuning.assume_capability(capability):
            tiles[capability] = [tuning.attention(k, q, describable=True) for k in tune.KERNELS]
    hopper, default = tiles.values()
    assert hopper != [replace(tile, descriptors=True) for tile in default]


def test_the_batch_does_not_decide_on_the_tile() -> None:
    """Else a sequence would give other bits in another batch."""
    with tuning.assume_capability((9, 0)):
        for T in (1, tuning.SHORT, tuning.SHORT + 1):
            few, many = (torch.empty(B, T, H, 64, dtype=torch.bfloat16) for B, H in ((1, 1), (500, 9)))
            assert tuning.attention("fwd", few) == tuning.attention("fwd", many)
        short, long = (torch.empty(1, T, 1, 64, dtype=torch.bfloat16) for T in (256, 257))
        tiles = [tuning.attention("fwd", q, describable=True) for q in (short, long)]
        assert tiles[0].BLOCK_M < tiles[1].BLOCK_M


@pytest.fixture
def tuning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv("FUSEDGPT_TUNING", str(path))
    return path


def test_saved_tiles_come_back_and_add_up(tuning_file: Path) -> None:
    other = Tile(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=2, descriptors=True)
    assert tuning.load_tiles(tuning.tuning_path(), "A") == {}
    tuning.save_tiles(tuning.tuning_path(), "A", {"one": SMALL})
    tuning.save_tiles(tuning.tuning_path(), "A", {"two": other})
    tuning.save_tiles(tuning.tuning_path(), "B", {"one": other})
    assert tuning.load_tiles(tuning_file, "A") == {"one": SMALL, "two": other}
    assert tuning.load_tiles(tuning_file, "B") == {"one": other}
    assert list(tuning_file.parent.iterdir()) == [tuning_file]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"A": {"one": {"BLOCK_M": 64}}}',
        '{"A": {"one": {"BLOCK_M": 96, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}}}',
        '{"A": {"one": {"BLOCK_M": 64, "BLOCK_N": 8, "num_warps": 4, "num_stages": 1}}}',
        '{"A": {"one": {"BLOCK_M": "64", "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}}}',
        '{"A": {"one": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 0}}}',
    ],
)
def test_a_bad_tuning_file_is_ignored_with_its_remedy(content: str, tuning_file: Path) -> None:
    tuning_file.parent.mkdir()
    tuning_file.write_text(content)
    tuning.load_tiles.cache_clear()
    with pytest.warns(UserWarning, match=r"tuning\.json is ignored, it is not a tuning file .* delete it"):
        assert tuning.load_tiles(tuning_file, "A") == {}
    tuning.save_tiles(tuning_file, "A", {"one": SMALL})  # a measurement replaces it
    assert tuning.load_tiles(tuning_file, "A") == {"one": SMALL}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A query that claims to be on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("FUSEDGPT_TUNING", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    tuning.load_tiles.cache_clear()
    tuning._tile.cache_clear()
    yield SimpleNamespace(dtype=Q.dtype, shape=Q.shape, device=torch.device("cuda:0"))
    tuning._tile.cache_clear()


@pytest.mark.parametrize("home", ["/dev/null", "another user's", None])
def test_without_a_home_a_launch_takes_the_default(
    on_a_gpu: Any, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    if home is None:
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        with pytest.raises(OSError, match="set FUSEDGPT_TUNING to a path"):
            tuning.tuning_path()
    else:
        monkeypatch.setenv("HOME", home)
    if home == "another user's":
        monkeypatch.setattr(Path, "read_text", refuse)
    assert tuning.attention("fwd", on_a_gpu) == tuning.default_attention("fwd", on_a_gpu, "plain", False)


def test_a_measured_tile_goes_before_the_tables() -> None:
    key = tuning.attention_key("fwd", Q, "plain")
    assert key == "attention_fwd bf16 64 plain short"
    with tuning.override(key, SMALL):
        assert tuning.attention("fwd", Q) == SMALL
    assert tuning.attention("fwd", Q) != SMALL
    described = Tile(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, descriptors=True)
    with tuning.override(key, described):  # but not where descriptors cannot address the tensors
        assert tuning.attention("fwd", Q, describable=False) != described


def test_the_search_takes_the_fastest_tile_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, with a clock that calls BLOCK_M 16 fast; the wrong tile is faster still and is refused."""
    monkeypatch.setattr(tune, "_TOKENS", 70)
    monkeypatch.setattr(tune, "_WIDTH", 16)
    monkeypatch.setattr(tune, "_CHECKED", {True: 70})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = Tile(BLOCK_M=32, BLOCK_N=64, num_warps=1, num_stages=1)
    current: list[Tile] = []
    launch = tune.attention._launch

    def sabotaged(kernel: Any, tile: Tile, *arguments: Any, scale: float, **options: Any) -> None:
        current.append(tile)
        launch(kernel, tile, *arguments, scale=scale * (1.01 if tile == wrong else 1.0), **options)

    def timer(run: Callable[[], object]) -> float:
        current.clear()
        run()
        return 0.5 if wrong in current else 1.0 if SMALL in current else 2.0

    monkeypatch.setattr(tune.attention, "_launch", sabotaged)
    found = tune.search(device, head_size=16, dtype=torch.float32, T=70, tiles=[wrong, SMALL], timer=timer)
    assert [choice.key for choice in found] == [
        f"attention_{kernel} fp32 16 plain short" for kernel in tune.KERNELS
    ]
    assert all(choice.tile == SMALL for choice in found)
    assert (found[0].ms, found[0].default_ms) == (1.0, 2.0)
    assert found[0].timed == [(wrong, 0.5), (SMALL, 1.0)]


FITS = """
import torch
from fusedgpt.kernels.tools import tune
from fusedgpt.kernels.tuning import Tile
for M, N in (64, 64), (128, 128):
    tile = Tile(BLOCK_M=M, BLOCK_N=N, num_warps=4, num_stages=3)
    print(tune._fits("fwd", tile, arch=80, shape=(1, 1024, 2, 128), dtype=torch.bfloat16, feature="plain"))
"""


def test_the_search_refuses_what_spills_or_does_not_fit(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FITS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_launch_reads_neither_environment_nor_file(on_a_gpu: Any, tuning_file: Path) -> None:
    tuning.save_tiles(tuning_file, "NVIDIA H100", {tuning.attention_key("fwd", on_a_gpu, "plain"): SMALL})
    assert tuning.attention("fwd", on_a_gpu) == SMALL
    tuning_file.unlink()
    tuning.load_tiles.cache_clear()
    assert tuning.attention("fwd", on_a_gpu) == SMALL  # until something is saved
    tuning.save_tiles(tuning_file, "NVIDIA H100", {})
    assert tuning.attention("fwd", on_a_gpu) != SMALL


def test_what_has_not_compiled_by_the_deadline_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(kernel: str, tile: Tile, **_: Any) -> bool:
        time.sleep(0.01 if tile == SMALL else 0.5)
        return True

    monkeypatch.setattr(tune, "_fits", fits)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    work = [("fwd", SMALL), ("dq", replace(SMALL, num_warps=8))]
    steps: list[int] = []
    found = tune._fitting(work, Q, "plain", time.monotonic() + 0.25, lambda: steps.append(1))
    assert (found, len(steps)) == (work[:1], 1)
    assert tune._fitting(work, Q, "plain", float("inf"), lambda: None) == work


def test_the_search_stops_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TOKENS", 8)
    monkeypatch.setattr(tune, "_WIDTH", 16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert tune.search(device, head_size=16, dtype=torch.float32, T=8, tiles=[], deadline=0.0) == []


def test_candidates_use_descriptors_where_there_are_some() -> None:
    for capability, expected in (((8, 0), {False}), ((9, 0), {True})):
        with tuning.assume_capability(capability):
            tiles = tune.candidates(torch.device("cpu"), "fwd")
            others = tune.candidates(torch.device("cpu"), "dq")
        assert {tile.descriptors for tile in tiles} == expected
        assert {tile for tile in tiles if not tile.ahead} == set(others)
        assert len(set(tiles)) == len(tiles)


def test_the_file_is_plain_json(tuning_file: Path) -> None:
    tuning.save_tiles(tuning_file, "NVIDIA H200", {"attention_fwd bf16 64 plain": SMALL})
    assert json.loads(tuning_file.read_text())["NVIDIA H200"]["attention_fwd bf16 64 plain"]["BLOCK_M"] == 16
