"""What a GPU would be asked to do, rehearsed without one: `fusedgpt kernels rehearse`.

train(), with its loader, validation and CUDA graphs, and generate() run on the meta device (meta_cuda.py).
Every launch of a kernel is compiled with exactly the specialisation that it has there. Models are cut to two
blocks, since all are equal; a third one shows what a block launches.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton

from fusedgpt.kernels.errors import InputError
from fusedgpt.kernels.tools import check
from fusedgpt.kernels.tools.cases import Case as CheckedCase
from fusedgpt.kernels.tools.cases import cases as checked_cases
from fusedgpt.kernels.tools.hardware import MULTIPROCESSORS
from fusedgpt.kernels.tools.report import ARCHITECTURES, problems
from fusedgpt.model.config import PRESETS
from fusedgpt.model.generate import Sampling, generate, sample_texts
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import byte_tokenizer
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.precision import cast_parameters
from fusedgpt.train.loop.step import Step
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.tools.meta_cuda import Fault, Record, meta_cuda
from fusedgpt.train.tools.torch_api import missing_from_torch

_MEANT = {  # where the host has to wait, for what
    ("train/report/step_log.py in TrainingLog.read", "copy to the host"),
    ("model/generate.py in continue_ids", "tensor on the GPU"),  # the prompt
    ("model/generate.py in _read", "synchronize"),
    ("train/loop/validation.py in evaluate", "a value is read"),
    ("train/run/training_state.py in Training._on_host", "copy to the host"),
    ("train/run/training_state.py in _copy", "copy from the host"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to rehearse; run(record, blocks) runs it with a model of so many blocks."""

    name: str
    run: Callable[[Record, int], Counter[str]]  # -> what a step launches
    blocks: tuple[int, ...] = (2, 3)  # of the models; without a second number launches go by step alone
    everywhere: bool = False  # whether without --full it runs for all architectures, not only the first


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What came of a case on one architecture."""

    case: str
    arch: int
    kernels: int = 0  # compiled ones
    block: dict[str, int] = field(default_factory=dict)  # launches of a step for each block, by kernel
    rest: dict[str, int] = field(default_factory=dict)  # its other launches
    faults: list[str] = field(default_factory=list)

    def cells(self) -> dict[str, str]:
        """Column -> text, for a table."""
        return {
            "case": self.case,
            "arch": f"sm_{self.arch}" if self.arch else "",
            "kernels compiled": str(self.kernels or ""),
            "launches per block": str(sum(self.block.values()) or ""),
            "others per step": str(sum(self.rest.values()) or ""),
            "faults": str(len(self.faults) or ""),
        }


def rehearse(
    architectures: Iterable[int] = ARCHITECTURES,
    *,
    full: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rehearsed]:
    """Rehearse for each architecture, e.g. 90: all cases for the first, a few for the others unless `full`.

    Raises ValueError for an unknown architecture, and under TRITON_INTERPRET=1.
    """
    architectures = tuple(architectures)
    for arch in architectures:
        if arch not in MULTIPROCESSORS:
            raise InputError(f"no architecture {arch}; there are {', '.join(map(str, MULTIPROCESSORS))}")
    if triton.knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET=1 interprets the kernels; unset it to compile them")
    tasks = [
        (arch, [case.name for case in cases(full) if full or case.everywhere or arch == architectures[0]])
        for arch in architectures
    ]
    results = [Rehearsed(case="functions of torch", arch=0, faults=missing_from_torch())]
    # fork: a spawned worker would spend seconds importing torch. An architecture each: kernels compile once.
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(tasks)), get_context("fork")) as pool:
        futures = [pool.submit(_rehearse_for, *task) for task in tasks]
        for done, _ in enumerate(as_completed(futures)):
            progress(done + 1, len(tasks))
        return [*results, *(result for future in futures for result in future.result())]


def _rehearse_for(arch: int, names: list[str]) -> list[Rehearsed]:
    torch.set_num_threads(1)
    seen: set[str] = set()  # kernels
    return [rehearse_case(case, arch, seen) for case in cases(full=True) if case.name in names]


def rehearse_case(case: Case, arch: int, seen: set[str]) -> Rehearsed:
    """`case` on `arch`; `seen` grows by the hashes of the kernels that were compiled."""
    launches, faults, kernels = [], [], 0
    for blocks in case.blocks:
        with meta_cuda(arch) as record:
            try:
                launches.append(case.run(record, blocks))
            except Exception as error:
                record.failed(error)
        new = {hash_: kernel for hash_, kernel in record.kernels.items() if hash_ not in seen}
        seen.update(new)
        kernels += len(new)
        faults += [f"{fault.where}: {fault.what}" for fault in record.faults if not _is_meant(fault)]
        for kernel, where in new.values():
            faults += [f"{where}: {kernel.src.fn.__name__} {x}" for x in problems(kernel, arch)]
        if faults:
            break
    block, rest = _split(launches, case.blocks[0])
    return Rehearsed(
        case=case.name,
        arch=arch,
        kernels=kernels,
        block=dict(block),
        rest=dict(rest),
        faults=list(dict.fromkeys(faults)),
    )


def _split(launches: list[Counter[str]], blocks: int) -> tuple[Counter[str], Counter[str]]:
    """Launches of one block, and those that are not of a block; the second count is of one block more."""
    block = launches[1] - launches[0] if len(launches) == 2 else Counter[str]()
    whole = launches[0] if launches else block
    return block, whole - Counter({name: blocks * n for name, n in block.items()})


def _is_meant(fault: Fault) -> bool:
    file, _, line = fault.where.partition(":")
    place = f"{file} {line.partition(' ')[2]}"
    return any(place == where and fault.what.startswith(what) for where, what in _MEANT)


def cases(full: bool) -> list[Case]:
    """What to rehearse; `full` adds the cases of `kernels check`."""
    checks = checked_cases(torch.device("cuda")) if full else []
    return [
        _training("gpt2 bf16, dropout", everywhere=True),
        _training("gpt2 bf16, no dropout", dropout=0.0),
        _training("gpt2 bf16, windows of 1,000 tokens", length=1000),
        _training("gpt2 bf16, documents", documents=True),
        _training("gpt2 bf16, documents, no dropout", documents=True, dropout=0.0),
        _training("gpt2 bf16, 2 micro-batches", batch_tokens=2 * 16 * 1024),
        _training("gpt2 bf16, checkpointing selective", checkpointing="selective"),
        _training("gpt2 bf16, checkpointing full", checkpointing="full"),
        _training("gpt2 bf16, label smoothing, z-loss", label_smoothing=0.1, z_loss=1e-4),
        _training("gpt2 bf16, deterministic", deterministic=True),
        _training("gpt2 bf16, CUDA graph", cuda_graphs="on"),
        _training("gpt2 bf16, Muon", optimizer="muon"),
        _training("12M bf16, CUDA graph, Muon", "12M", optimizer="muon", cuda_graphs="on"),
        _training("12M bf16, CUDA graph, 2 micro-batches", "12M", cuda_graphs="on", batch_tokens=1 << 14),
        _training("12M fp16, CUDA graph", "12M", cuda_graphs="on", precision="fp16"),
        _training("12M fp32", "12M", precision="fp32"),
        _generation("gpt2 bf16, 1 sample", 1, torch.bfloat16, everywhere=True),
        _generation("gpt2 bf16, 32 samples", 32, torch.bfloat16),
        _generation("gpt2 fp32, 1 sample", 1, torch.float32),
        *(_checked(case, dtype) for case in checks for dtype in check.DTYPES),
    ]


def _training(
    name: str,
    preset: str = "gpt2",
    *,
    length: int | None = None,  # of the windows; the model's context if None
    dropout: float = 0.1,
    documents: bool = False,
    everywhere: bool = False,
    **options: Any,  # of TrainConfig
) -> Case:
    settings: dict[str, Any] = {"batch_size": 16, "precision": "bf16", "compile": "off", "cuda_graphs": "off"}
    config = TrainConfig(device="cuda", steps=6, warmup=0, eval_every=4, **settings | options)

    def run(record: Record, blocks: int) -> Counter[str]:
        shape = PRESETS[preset].model_copy(update={"n_layer": blocks, "dropout": dropout})
        with torch.device("cuda"):
            model = GPT(shape)
        ids = np.arange(1 << 17, dtype=np.uint16) % 1000
        dataset = TokenDataset(
            train=ids,
            val=ids[:5000],
            max_length=length or shape.block_size,
            train_documents=131,
            val_documents=5,
            eot_id=999,
            document_masks=documents,
        )
        launches: Counter[str] = Counter()
        run_step = Step.run

        def counted(step: Step, *args: Any) -> Any:
            nonlocal launches
            before, begin = record.launches.copy(), len(record.work)
            result = run_step(step, *args)
            launches, record.step = record.launches - before, record.work[begin:]
            record.watching = True  # the first step makes tables and buffers
            return result

        with patch.object(Step, "run", counted):
            train(model, dataset, config)
        return launches

    return Case(name=f"training {name}", run=run, everywhere=everywhere)


def _generation(name: str, samples: int, dtype: torch.dtype, *, everywhere: bool = False) -> Case:
    def run(record: Record, blocks: int) -> Counter[str]:
        with torch.device("cuda"):
            model = GPT(PRESETS["gpt2"].model_copy(update={"n_layer": blocks}))
            prompt = torch.zeros(samples, 5, dtype=torch.int64)
        cast_parameters(model, dtype)
        before = record.launches.copy()
        sampling = Sampling(max_new_tokens=4, top_k=40, top_p=0.9, repetition_penalty=1.1)
        for _ in generate(model, prompt, **sampling):
            launches, before = record.launches - before, record.launches.copy()
            record.watching = True  # the first token comes from the prompt
        sample_texts(model, byte_tokenizer(), "to read", n_samples=samples, max_new_tokens=20)
        return launches

    return Case(name=f"sampling {name}", run=run, everywhere=everywhere)


def _checked(case: CheckedCase, dtype_name: str) -> Case:
    """A case of `kernels check`, forward and backward."""
    dtype = check.DTYPES[dtype_name]

    def run(record: Record, _: int) -> Counter[str]:
        with torch.device("cuda"):
            inputs = case.inputs(torch.Generator())
        typed = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        typed |= {name: typed[name].float() for name in case.fp32_inputs}
        check.run_case(case.ours, typed, None)
        return record.launches

    return Case(name=f"check {case.op} {case.shape} {dtype_name}", run=run, blocks=(0,))
