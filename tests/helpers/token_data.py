"""Datasets of documents that are given as ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.data.tokens.windows import pack_documents


def dataset_of(
    documents: Sequence[Sequence[int]],
    *,
    eot_id: int,
    max_length: int,
    val_fraction: float = 0.0,
    packing: bool = False,
) -> TokenDataset:
    """The documents, each followed by eot_id; the last val_fraction of the tokens are held out."""
    ids = np.array([i for document in documents for i in (*document, eot_id)], dtype=np.int32)
    train, val = np.split(ids, [len(ids) - round(len(ids) * val_fraction)])
    return TokenDataset(
        train=train,
        val=val,
        max_length=max_length,
        train_documents=int((train == eot_id).sum()),
        val_documents=int((val == eot_id).sum()),
        eot_id=eot_id,
        borders=pack_documents(np.flatnonzero(train == eot_id) + 1, max_length) if packing else None,
    )
