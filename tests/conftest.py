"""One thread per test process: the suite runs one process per core."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Also after a test that ran code which takes more."""
    torch.set_num_threads(1)
