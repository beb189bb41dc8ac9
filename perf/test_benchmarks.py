"""Every public kernel under pytest-benchmark: `pytest perf --benchmark-only --benchmark-json=FILE`.

pytest-benchmark's times are the host's, launch and synchronisation included. The names in its table
end in the device's: p50 with a cold L2 (perf/_timing.py), and the share of the read bandwidth;
`extra_info` has p20, p80, bytes and GB/s too. Without a CUDA card nothing is measured.
"""

import itertools
from typing import Any

import pytest
import torch

from perf._timing import Card
from perf.kernels import KERNELS, measured


@pytest.fixture(scope="session")
def card() -> Card:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card: nothing was measured")
    return Card.current()


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(benchmark: Any, card: Card, name: str) -> None:
    kernel = KERNELS[name](card)
    benchmark.extra_info.update(row := measured(kernel, card))
    benchmark.name = f"{name}: {row['device_us_p50']:.4g} us, {row['share']:.0%}"
    calls = itertools.cycle(kernel.calls)

    def launch() -> None:
        next(calls)()
        torch.cuda.synchronize()

    benchmark.pedantic(launch, rounds=20, warmup_rounds=2)
