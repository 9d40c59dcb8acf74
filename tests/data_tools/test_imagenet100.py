"""data_tools/imagenet100.txt: Table 4's classes."""

import hashlib
import re
from pathlib import Path

import timm
from PIL import Image

from data_tools.make_shards import main
from hdscale.data.index import open_shards
from hdscale.shards.sources.classes import read_class_list

CMC_S = "fa2b1926ad6f96fb2011dfd8e1621f1d1c1014144cbb3465ee1579cb042df394"
LIST = Path(__file__).resolve().parents[2] / "data_tools/imagenet100.txt"


def test_it_names_100_different_synsets_of_imagenet_1k():
    synsets = read_class_list(LIST)
    assert len(set(synsets)) == len(synsets) == 100
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)
    imagenet_1k = (Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    assert len(imagenet_1k) == 1000
    assert set(synsets) < set(imagenet_1k)
    # CMC's list, in its order.
    assert hashlib.sha256(" ".join(synsets).encode()).hexdigest() == CMC_S


def test_shards_of_these_classes_are_made_by_their_list(tmp_path):
    synsets = read_class_list(LIST)
    for number, synset in enumerate([*synsets, "n01440764"]):  # the last one is no class of ImageNet-100
        (tmp_path / "train" / synset).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "train" / synset / f"{number}.png")
    arguments = ["--source", "imagefolder", "--input", str(tmp_path / "train"), "--output", str(tmp_path / "shards")]
    assert main([*arguments, "--only-classes", str(LIST), "--workers", "1"]) == 0
    shards = open_shards(tmp_path / "shards", "train")
    assert shards.classes == synsets
    assert shards.num_samples == 100
