import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from data_tools.index_shards import main
from hdscale.cli import EXIT_STOPPED, EXIT_USER_ERROR, exit_code
from hdscale.data.index import open_shards
from tests.helpers.files import content
from tests.helpers.launcher import until_ended

ROOT = Path(__file__).resolve().parents[2]


def write_tars(folder, count, samples):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar"), mtime=0) as tar:
            for row in range(samples):
                buffer = io.BytesIO()
                pixels = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                data = buffer.getvalue() if row else b""  # the first cannot be decoded
                tar.write({"__key__": f"{number:03d}{row:04d}", "jpg": data, "cls": row % 5})


@pytest.fixture
def tars(tmp_path):
    write_tars(tmp_path / "tars", 3, 10)
    return tmp_path / "tars"


def test_tars_of_others_become_a_split(tars, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\nf\n")
    assert main(["--input", str(tars), "--workers", "2", "--classes", str(names)]) == 0
    shards = open_shards(tars, "train")
    assert (shards.num_samples, shards.classes) == (27, tuple("abcdef"))
    out, err = capsys.readouterr()
    assert out.startswith("train: 27 samples of 6 classes in 3 tars")
    assert "train: 3 of 3 tars" in err
    assert "27 samples" in err
    assert "index-report.jsonl names all of it" in err
    assert "000.tar:0000000.jpg is empty" in err


def test_mistakes_are_one_line_and_exit_code_2(tars, capsys):
    for more in (["--labels", "x"], ["--pattern", "*.tgz"], ["--split", "a/b"], ["--labels", "json:x"]):
        assert exit_code(main, ["--input", str(tars), "--workers", "1", *more]) == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == 4


def test_a_path_that_the_file_system_refuses_is_one_line(tars, capsys):
    for options in (["--input", "x" * 300], ["--input", str(tars), "--split", "x" * 300]):
        assert exit_code(main, [*options, "--workers", "1"]) == EXIT_USER_ERROR
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("train: ")]
        assert line.startswith("error: --input ")


def test_ctrl_c_says_how_to_continue(tars, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.index_shards.index_split", interrupt)
    assert main(["--input", str(tars)]) == EXIT_STOPPED
    assert "the same command continues" in capsys.readouterr().err


def test_workers_import_no_torch():
    code = "import sys, hdscale.shards.indexer; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def start(folder):
    command = [sys.executable, "data_tools/index_shards.py", "--input", str(folder), "--workers", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def finished(folder):
    return list(folder.glob("train.indexing/0*.json"))


def staged(folder):
    return list(folder.glob("train.indexing/.0*.tmp"))


def kill_when(folder, process, reached):
    """Kill a run as soon as its folder has come so far; return whether it was still running."""
    while not reached() and process.poll() is None:
        time.sleep(0.0005)  # looks again, however long that takes
    running = process.poll() is None
    assert running or process.returncode == 0, "it failed"
    children = psutil.Process(process.pid).children(recursive=True) if running else []
    process.kill()
    process.wait()
    until_ended(children)  # workers end with their parent
    return running


def moment(folder, more):
    """A kill's moment: the run has begun to record, a file has only its temporary name, or so many more tars are done.

    The workers may finish what they hold before the kill comes: there are enough tars for all moments.
    """
    if more == "begun":
        return (folder / "train.indexing").is_dir
    if more == "staged":
        return lambda: staged(folder)
    goal = len(finished(folder)) + more
    return lambda: len(finished(folder)) >= goal


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    write_tars(tmp_path / "whole", 40, 60)
    shutil.copytree(tmp_path / "whole", tmp_path / "tars")
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    assert start(tmp_path / "whole").wait() == 0

    counts = []
    for more in ("begun", 0, 1, "staged", 3, 2, "staged", 4):
        while not kill_when(parts, start(parts), moment(parts, more)):
            shutil.rmtree(parts)  # it ended before anybody looked: begin again
            shutil.copytree(tmp_path / "tars", parts)
        counts.append(len(finished(parts)))
    assert any(0 < count < 40 for count in counts)
    assert start(parts).wait() == 0
    assert content(parts) == content(tmp_path / "whole")
