from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fusedgpt.train.cli.main import main
from fusedgpt.train.tools import predict_step, rehearse
from fusedgpt.train.tools.meta_cuda import Record, TorchOp


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def product(M: int, K: int, N: int) -> float:
    """Seconds."""
    return predict_step._torch_seconds(TorchOp("aten.mm", [meta(M, K), meta(K, N)], [meta(M, N)]))


def test_a_large_product_runs_at_the_stated_rate() -> None:
    assert 2 * 8448**3 / product(8448, 8448, 8448) == pytest.approx(
        790e12, rel=0.05
    )  # 66 x 33 tiles: 16.5 waves


def test_products_take_whole_waves() -> None:
    wave, more = (product(128 * tiles, 1 << 16, 256) for tiles in (132, 134))
    assert more > 1.05 * wave  # 67 tiles of half the inner dimension, and so on
    assert product(128, 1 << 16, 256) < wave / 7  # the inner dimension is divided


def test_an_output_among_the_inputs_is_no_factor() -> None:
    a, b, out = meta(8448, 768), meta(768, 50304), meta(8448, 50304)
    given = predict_step._torch_seconds(TorchOp("aten.mm", [a, b, out], [out]))
    assert given == product(8448, 768, 50304)


def test_other_ops_take_their_bytes() -> None:
    x = meta(1 << 28)
    seconds = predict_step._torch_seconds(TorchOp("aten.add", [x, x], [meta(1 << 28)]))
    assert seconds == pytest.approx(4 * (1 << 28) / 4.2e12, rel=0.01)  # x is read once


def test_blocks_are_multiplied_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(record: Record, blocks: int) -> object:
        x = meta(1 << 20)
        record.step = [TorchOp("aten.add", [x], [x])] * (3 * blocks) + [TorchOp("aten.mul", [x], [x])]
        return None

    case = rehearse.Case(name="training gpt2 bf16, dropout", run=run)  # type: ignore[arg-type]
    monkeypatch.setattr(predict_step, "cases", lambda full: [case])
    add, mul, together = predict_step.predict_step()
    assert (add.kernel, add.launches, mul.kernel, mul.launches) == ("aten.add", 36, "aten.mul", 1)
    assert (together.launches, together.milliseconds) == (37, pytest.approx(37 * mul.milliseconds))


def test_the_command_prints_the_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [predict_step.Part(kernel="_gelu_kernel", launches=12, milliseconds=1.234)]
    monkeypatch.setattr(predict_step, "predict_step", lambda dropout: parts)
    with pytest.raises(SystemExit) as ended:
        main(["kernels", "report", "--step"])
    assert not ended.value.code
    assert capsys.readouterr().out.split() == ["kernel", "launches", "predicted", "ms", "gelu", "12", "1.23"]
