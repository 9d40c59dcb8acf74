"""Process groups for tests in one process."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
