import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from hdscale import provenance
from hdscale.provenance import ROOT, source_digest, versions


@pytest.fixture
def source(tmp_path):
    """A checkout of two modules and a script."""
    for name in ("hdscale/a.py", "hdscale/deep/b.py", "launch/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    return tmp_path


def test_the_digest_is_of_names_and_contents_only(source, tmp_path_factory):
    before = source_digest(source)
    copy = tmp_path_factory.mktemp("copy") / "elsewhere"
    shutil.copytree(source, copy)
    os.utime(copy / "hdscale/a.py", (0, 0))
    (copy / "README.md").write_text("another")
    (copy / "hdscale/__pycache__").mkdir()
    (copy / "hdscale/__pycache__/a.pyc").write_bytes(b"compiled")
    assert source_digest(copy) == before
    assert len(before) == 64


@pytest.mark.parametrize("change", ["edited", "renamed", "swapped", "added", "removed", "moved over a border"])
def test_any_change_of_the_code_changes_the_digest(change, source):
    a, b, c = (source / name for name in ("hdscale/a.py", "hdscale/deep/b.py", "launch/c.py"))
    before = source_digest(source)
    if change == "edited":
        b.write_text(b.read_text() + "\n")
    elif change == "renamed":
        c.rename(c.with_name("d.py"))
    elif change == "swapped":
        texts = a.read_text(), b.read_text()
        b.write_text(texts[0])
        a.write_text(texts[1])
    elif change == "added":
        (source / "hdscale/deep/empty.py").write_text("")
    elif change == "removed":
        a.unlink()
    else:
        b.rename(a.with_name("b.py"))
    assert source_digest(source) != before


def test_versions_are_those_installed_and_a_missing_package_is_said_to_be_missing(monkeypatch):
    found = versions()
    assert found["torch"] == metadata.version("torch")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-of-ours",))
    assert versions()["no-such-package-of-ours"] == "not installed"


def test_nothing_heavy_is_imported_for_it():
    code = (
        "import sys; from hdscale.provenance import source_digest, versions; print(source_digest()); versions(); "
        "assert not {'torch', 'deepspeed', 'numpy', 'timm'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == source_digest()
