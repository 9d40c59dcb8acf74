import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_tools.make_shards import main
from hdscale.cli import EXIT_STOPPED, EXIT_USER_ERROR, exit_code
from hdscale.data.index import open_shards
from tests.helpers.files import content
from tests.helpers.launcher import until_ended

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pictures(tmp_path):
    """Two classes of ten pictures each."""
    generator = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "pictures" / f"class{number % 2}" / f"{number:02d}.{('jpg', 'png', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def arguments(pictures, output, *more):
    command = ["--source", "imagefolder", "--input", str(pictures), "--output", str(output), "--samples-per-shard", "2"]
    return [*command, *more]


def test_digits_become_a_train_and_a_val_split(tmp_path, capsys):
    command = ["--source", "digits", "--output", str(tmp_path), "--val-fraction", "0.2", "--workers", "1"]
    assert main(command) == 0
    train, val = (open_shards(tmp_path, split) for split in ("train", "val"))
    assert train.num_samples + val.num_samples == 1797
    assert 300 < val.num_samples < 420
    assert train.classes == val.classes == tuple("0123456789")
    assert f"val: {val.num_samples} samples of 10 classes in 1 shards" in capsys.readouterr().out


def test_a_folder_of_pictures_becomes_shards(pictures, tmp_path):
    assert main(arguments(pictures, tmp_path / "shards", "--workers", "2")) == 0
    shards = open_shards(tmp_path / "shards", "train")
    assert shards.classes == ("class0", "class1")
    keys = [shards.member_name(row) for row in range(20)]
    assert [int(key[5]) for key in keys] == shards.index["label"].tolist()
    assert sorted(int(key.split("_")[1][:2]) for key in keys) == list(range(20))


def test_broken_pictures_are_named_and_do_not_end_the_run(pictures, tmp_path, capsys):
    (pictures / "class0" / "broken.jpg").write_bytes(b"nothing")
    (pictures / "class0" / "notes.txt").write_text("")
    assert main(arguments(pictures, tmp_path / "shards", "--workers", "1")) == 0
    messages = capsys.readouterr().err
    assert "warning: 1 pictures skipped" in messages
    assert "class0/broken.jpg is none of JPEG" in messages
    assert "left out: 1 files with other extensions" in messages


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert exit_code(main, arguments(tmp_path / "nowhere", tmp_path / "shards")) == EXIT_USER_ERROR
    assert exit_code(main, ["--source", "imagefolder", "--output", str(tmp_path)]) == EXIT_USER_ERROR
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --input")
    assert second.startswith("error: --source imagefolder needs --input")


@pytest.mark.parametrize("busy", ["write_split", "ImageFolder.listing"])
def test_ctrl_c_says_how_to_continue(busy, pictures, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"data_tools.make_shards.{busy}", interrupt)
    assert main(arguments(pictures, tmp_path / "shards")) == EXIT_STOPPED
    assert "the same command continues" in capsys.readouterr().err


# One picture holds its worker for ever, in the middle of a shard.
BLOCKED = """
import multiprocessing
import time

from data_tools.make_shards import main
from hdscale.cli import run
from hdscale.shards.sources.image_folder import ImageFolder

read = ImageFolder.read
ImageFolder.read = lambda self, name, place: time.sleep(3600) if name == "class1/09.jpg" else read(self, name, place)
multiprocessing.set_start_method("fork")
run(main)
"""


def test_a_killed_run_continues_to_the_same_bytes(pictures, tmp_path):
    main(arguments(pictures, tmp_path / "whole", "--workers", "1"))
    command = [sys.executable, "-c", BLOCKED, *arguments(pictures, tmp_path / "parts", "--workers", "2")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while len(list((tmp_path / "parts").glob("train.making/0*.json"))) < 9:
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until_ended(children)  # workers end with their parent

    assert not (tmp_path / "parts" / "train.manifest.json").exists()
    assert len(list((tmp_path / "parts").glob("train-*.tar"))) == 9
    main(arguments(pictures, tmp_path / "parts", "--workers", "2"))
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
