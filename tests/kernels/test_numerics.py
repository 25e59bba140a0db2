"""What is set for a while is set, and then as it was."""

from __future__ import annotations

import pytest
import torch

from fusedgpt.kernels.numerics import fp32_sums

MATMUL = torch.backends.cuda.matmul


def settings() -> tuple[bool, ...]:
    """Reduced precision in bf16 and fp16; splitting along K in both."""
    return (
        MATMUL.allow_bf16_reduced_precision_reduction,
        MATMUL.allow_fp16_reduced_precision_reduction,
        MATMUL.allow_bf16_reduced_precision_reduction_split_k,
        MATMUL.allow_fp16_reduced_precision_reduction_split_k,
    )


def test_sums_are_fp32_for_a_while() -> None:
    assert settings() == (True, True, True, True)  # torch's default
    with fp32_sums():
        assert settings() == (False, False, True, True)
        with fp32_sums():
            pass
        assert settings() == (False, False, True, True)  # as the caller set it
    with pytest.raises(KeyError), fp32_sums():
        raise KeyError
    assert settings() == (True, True, True, True)


def test_each_dtype_is_as_it_was() -> None:
    MATMUL.allow_fp16_reduced_precision_reduction = False, False
    try:
        with fp32_sums():
            assert settings() == (False, False, True, False)
        assert settings() == (True, False, True, False)
    finally:
        MATMUL.allow_fp16_reduced_precision_reduction = True
