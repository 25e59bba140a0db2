"""torch.compile's backends for tests."""

from __future__ import annotations

from functools import partial

from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd

# inductor's graphs without its code generation, which takes a minute on a CPU
INDUCTOR_GRAPHS = aot_autograd(
    fw_compiler=nop,
    bw_compiler=nop,
    partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    keep_inference_input_mutations=True,
)
