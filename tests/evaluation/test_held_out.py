import shutil

import pytest

from hdscale.config.sections import DataConfig, EvaluationConfig
from hdscale.errors import UserError
from hdscale.evaluation.held_out import open_held_out
from hdscale.shards.indexer import IndexJob, index_split
from hdscale.shards.labels import label_rule


def test_samples_without_labels_are_no_class_of_their_own(world, tmp_path):
    shards = shutil.copytree(world.folder / "shards", tmp_path / "shards")
    job = IndexJob(shards, "val", "train-*.tar", label_rule("none", None), None, (), {"tool": "index_shards"})
    index_split(job, 0, lambda count, note: None)
    data = DataConfig(shards=str(shards), img_size=8, workers=0)
    with pytest.raises(UserError, match=r"k-NN needs labels, but 60 of 60 samples of split val in .* have none"):
        open_held_out(data, EvaluationConfig())
