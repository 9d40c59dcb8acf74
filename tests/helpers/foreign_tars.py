"""Tars that others might have written, and the indexing of a folder of them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from hdscale.data.index import open_shards
from hdscale.shards.indexer import IndexJob, index_split
from hdscale.shards.labels import label_rule


def picture(form="JPEG", size=(12, 9), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


JPG = picture()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """Write a tar of (name, data) pairs, or of (TarInfo, data) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, kind=tarfile.SYMTYPE, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def job_for(folder, labels="auto", classes=None, split="train", pattern="*.tar", pictures=()):
    rule = label_rule(labels, None if classes is None else len(classes))
    made_by = {"tool": "index_shards", "labels": labels, "pattern": pattern}
    return IndexJob(folder, split, pattern, rule, classes, pictures, made_by)


def index(folder, workers=0, **settings):
    return index_split(job_for(folder, **settings), workers, lambda count, note: None)


def found(folder, split="train"):
    """Names and labels of the samples, and names and reasons of what was left out."""
    shards = open_shards(folder, split)
    samples = [(shards.member_name(row), int(shards.index[row]["label"])) for row in range(shards.num_samples)]
    lines = (folder / f"{split}.index-report.jsonl").read_text().splitlines()
    return samples, {line["name"]: line["reason"] for line in map(json.loads, lines)}


def good(number, label=1):
    return [(f"good{number}.jpg", JPG), (f"good{number}.cls", b"%d" % label)]


def three_tars(folder):
    for number in range(3):
        write_tar(folder / f"{number}.tar", [*good(number), ("bad.jpg", b"")])


def open_end(path):
    """Where the end of a tar's archive begins."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return tar.offset
