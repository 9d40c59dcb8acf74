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


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    code = "import sys, hdscale.data.indexer; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def start(folder):
    command = [sys.executable, "data_tools/index_shards.py", "--input", str(folder), "--workers", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def test_a_run_killed_at_ten_random_moments_ends_with_the_same_bytes(tmp_path):
    write_tars(tmp_path / "whole", 40, 60)
    shutil.copytree(tmp_path / "whole", tmp_path / "tars")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    began, process = time.monotonic(), start(tmp_path / "whole")
    assert process.wait() == 0
    duration = time.monotonic() - began

    generator, states = np.random.default_rng(0), set()
    for attempt in range(10):
        if len(records(tmp_path / "parts")) == 40 or (tmp_path / "parts" / "train.manifest.json").exists():
            shutil.rmtree(tmp_path / "parts")  # nothing is left to do: begin again
            shutil.copytree(tmp_path / "tars", tmp_path / "parts")
        finished = len(records(tmp_path / "parts"))
        process = start(tmp_path / "parts")
        while attempt % 2 and len(records(tmp_path / "parts")) <= finished and process.poll() is None:
            time.sleep(0.002)  # most of a short run is its start
        time.sleep(generator.uniform(0, duration / 4 if attempt % 2 else duration))
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        psutil.wait_procs(children)  # workers end with their parent
        states.add(len(records(tmp_path / "parts")))
    assert len(states) > 2
    assert start(tmp_path / "parts").wait() == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def records(folder):
    return list(folder.glob("train.indexing/0*.json"))
