import json
import os
import shutil
import zlib

import numpy as np
import pytest

from data_tools.index_shards import main as index
from data_tools.make_shards import main as make
from data_tools.verify_shards import EXIT_BAD, main
from hdscale.cli import EXIT_STOPPED, EXIT_USER_ERROR, exit_code
from hdscale.data.index import open_shards
from hdscale.hashing import file_digest
from hdscale.shards.sources.digits import Digits
from hdscale.shards.split import SplitSettings, assign_splits
from hdscale.shards.writer import SplitJob, write_split


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """60 digits in 6 shards; read only."""
    folder = tmp_path_factory.mktemp("whole")
    listing = Digits().listing()
    rows = assign_splits(listing, SplitSettings())["train"][:60]
    names = [listing.names[row] for row in rows]
    write_split(SplitJob(Digits(), folder, "train", listing.classes, names, listing.labels[rows], 10, {}), 0, id)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "shards")


def verify(folder, *more):
    """Return exit code and report."""
    report = folder.parent / "report.jsonl"
    code = main(["--shards", str(folder), "--report", str(report), "--workers", "1", *more])
    return code, [json.loads(line) for line in report.read_text().splitlines()]


DEPTHS = pytest.mark.parametrize("depth", [["--quick"], []], ids=["quick", "full"])


@DEPTHS
def test_good_shards_are_good(folder, depth, capsys):
    assert verify(folder, *depth) == (0, [])
    assert "train: all 60 samples are good" in capsys.readouterr().out


@DEPTHS
def test_a_missing_shard_and_each_of_its_samples_is_reported(folder, depth, capsys):
    (folder / "train-000002.tar").unlink()
    code, lines = verify(folder, *depth)
    assert code == EXIT_BAD
    assert lines[0] == {"shard": "train-000002.tar", "sample": None, "name": None, "reason": "is missing"}
    assert [line["sample"] for line in lines[1:]] == list(range(20, 30))
    assert "train: 10 of 60 samples and 1 files are bad" in capsys.readouterr().out


@DEPTHS
def test_samples_before_a_cut_are_good(folder, depth):
    start = int(open_shards(folder, "train").index[25]["offset"])
    os.truncate(folder / "train-000002.tar", start + 5)
    code, lines = verify(folder, *depth)
    assert code == EXIT_BAD
    files = [line["reason"] for line in lines if line["sample"] is None]
    assert files[0].startswith(f"has {start + 5} bytes, not ")
    assert files[1].startswith(f"is cut at byte {start + 5}")
    assert len(files) == (2 if depth else 3)
    samples = [line for line in lines if line["sample"] is not None]
    assert [line["sample"] for line in samples] == list(range(25, 30))
    assert samples[0]["reason"] == "is a file that is cut"
    assert samples[1]["reason"] == "no header of a member stands where the index says"


@DEPTHS
def test_a_replaced_shard_is_found(folder, depth):
    shutil.copy(folder / "train-000000.tar", folder / "train-000001.tar")
    code, lines = verify(folder, *depth)
    assert code == EXIT_BAD
    assert {line["shard"] for line in lines} == {"train-000001.tar"}
    assert sum(line["sample"] is not None for line in lines) >= 9


def flip(folder, row, at=40):
    record = open_shards(folder, "train").index[row]
    with (folder / f"train-{row // 10:06d}.tar").open("r+b") as file:
        file.seek(int(record["offset"]) + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_by_the_full_check(folder):
    name = open_shards(folder, "train").member_name(33)
    flip(folder, 33)
    assert verify(folder, "--quick") == (0, [])
    code, lines = verify(folder)
    assert code == EXIT_BAD
    assert lines == [
        {
            "shard": "train-000003.tar",
            "sample": None,
            "name": None,
            "reason": "has another sha256 than the manifest says",
        },
        {"shard": "train-000003.tar", "sample": 33, "name": name, "reason": "is damaged (wrong CRC32)"},
    ]


def rewrite_index(folder, change):
    """Change the index and let the manifest agree, as if a tool had made both that way."""
    index = np.load(folder / "train.index.npy")
    change(index)
    np.save(folder / "train.index.npy", index)
    path = folder / "train.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["index_digest"] = file_digest(folder / "train.index.npy")
    for number, entry in enumerate(manifest["shards"]):
        entry["sha256"] = file_digest(folder / f"train-{number:06d}.tar")
    path.write_text(json.dumps(manifest))


def test_a_picture_that_cannot_be_decoded_is_found_though_its_crc_is_right(folder):
    flip(folder, 33, at=60)
    record = open_shards(folder, "train").index[33]
    data = (folder / "train-000003.tar").read_bytes()[int(record["offset"]) :][: int(record["size"])]
    rewrite_index(folder, lambda index: index["crc32"].__setitem__(33, zlib.crc32(data)))
    code, (line,) = verify(folder)
    assert code == EXIT_BAD
    assert line["sample"] == 33
    assert "cannot be decoded" in line["reason"]


def test_a_size_other_than_that_of_the_index_is_found(folder):
    rewrite_index(folder, lambda index: index["width"].__setitem__(7, 9))
    code, (line,) = verify(folder)
    assert (code, line["sample"], line["reason"]) == (EXIT_BAD, 7, "has 8 x 8 pixels, not 9 x 8")


@DEPTHS
def test_an_index_that_changed_is_reported_and_shards_are_still_checked(folder, depth):
    with (folder / "train.index.npy").open("ab") as file:
        file.write(b"\0")
    (folder / "train-000005.tar").unlink()
    code, lines = verify(folder, *depth)
    assert code == EXIT_BAD
    assert [line["shard"] for line in lines] == ["train.index.npy", "train-000005.tar"]
    assert lines[0]["reason"] == "changed since the manifest was made: no sample can be checked"
    (folder / "train.index.npy").unlink()
    assert verify(folder, *depth)[1][0]["reason"].startswith("is missing")


def test_an_index_of_another_length_is_reported(folder):
    rewrite_index(folder, lambda index: None)
    path = folder / "train.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_samples": 61}))
    assert verify(folder, "--quick")[1][0]["reason"].startswith("has another number of samples than the manifest")


def test_the_report_does_not_depend_on_the_number_of_workers(folder):
    for row in (1, 12, 58, 33):
        flip(folder, row)
    (folder / "train-000004.tar").unlink()
    assert verify(folder) == verify(folder, "--workers", "2")


def test_the_report_is_beside_the_shards_by_default(folder):
    assert main(["--shards", str(folder), "--quick", "--workers", "1"]) == 0
    assert (folder / "train.verify.jsonl").read_text() == ""


def test_mistakes_are_one_line_and_exit_code_2(folder, capsys):
    assert exit_code(main, ["--shards", str(folder), "--split", "val"]) == EXIT_USER_ERROR
    command = ["--shards", str(folder), "--quick", "--workers", "1", "--report", str(folder / "no" / "report")]
    assert exit_code(main, command) == EXIT_USER_ERROR
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "has the splits train only" in lines[0]
    assert "report cannot be written to (No such file or directory): name another file" in lines[1]


def test_a_path_that_the_file_system_refuses_is_one_line(capsys):
    assert exit_code(main, ["--shards", "x" * 300]) == EXIT_USER_ERROR
    assert "train.manifest.json cannot be read (File name too long)" in capsys.readouterr().err


def test_ctrl_c_is_told(folder, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.verify_shards.check_split", interrupt)
    assert main(["--shards", str(folder)]) == EXIT_STOPPED
    assert "stopped; there is no report" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "-3"])
def test_a_number_of_workers_below_one_is_refused(folder, workers, capsys):
    assert exit_code(main, ["--shards", str(folder), "--workers", workers]) == EXIT_USER_ERROR
    expected = f"error: --workers must be at least 1, got {workers}: leave it out for one a core\n"
    assert capsys.readouterr().err == expected
    for tool in (make, index):
        where = ["--input", str(folder)] if tool is index else ["--source", "digits", "--output", str(folder / "new")]
        assert exit_code(tool, [*where, "--workers", workers]) == EXIT_USER_ERROR
        assert capsys.readouterr().err == expected
