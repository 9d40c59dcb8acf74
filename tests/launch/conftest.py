import os
import shutil

import pytest

from tests.helpers.demo import write_demo
from tests.helpers.hosts import hosts_on_one_machine, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Four hosts, one of which tests may switch off if they switch it on again."""
    reason = why_not()
    if reason is not None and "CI" not in os.environ:  # where nothing may be skipped
        pytest.skip(reason)
    with hosts_on_one_machine(tmp_path_factory.mktemp("hosts") / "cluster", 4) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The folder of a small demo's files."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture
def other_on_node2(cluster, tmp_path):
    """Show node2 another file or folder than the other hosts."""
    bound = []

    def show(target, change):
        source = tmp_path / target.name
        (shutil.copytree if target.is_dir() else shutil.copy)(target, source)
        change(source)
        cluster.bind("node2", source, target)
        bound.append(target)

    yield show
    for target in bound:
        cluster.unbind("node2", target)
