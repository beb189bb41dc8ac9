"""`pytest perf --benchmark-only` measures on a CUDA card, and measures nothing without one."""

from __future__ import annotations

import pytest
import torch

from perf._timing import Card, NoCard


@pytest.fixture(scope="session")
def card() -> Card:
    try:
        return Card.current()
    except NoCard as error:
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("perf: no CUDA card, so nothing was measured", red=True)
