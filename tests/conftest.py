"""Where tests run: on the GPU if there is one, else kernels in Triton's interpreter on CPU
tensors."""

import os

# Oracles multiply small matrices: threads would only fight for the cores. Read when NumPy is
# imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# PyTorch before 2.13 may wait 300 s at its end for processes that compile (pytorch#162199).
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

# Before anything imports triton. Launchers still use their twins for CPU tensors unless
# tests.cases.kernels() is on.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

from tests import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases",
        type=int,
        default=int(os.environ.get("SPECTRAL_FUZZ_CASES", "60")),
        help="fuzz cases over all operations (default: SPECTRAL_FUZZ_CASES or 60)",
    )
    parser.addoption("--fuzz-case", default="", help="one fuzz case, as a failure prints it")


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes in NumPy, which warns of log(0), 0/0 and overflow where a kernel
    # means them.
    for warning in ("RuntimeWarning", "DeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}:triton.runtime.interpreter")


@pytest.fixture
def device() -> torch.device:
    return cases.DEVICE


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone: the same in every run and in any
    order."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
