"""Sessions for tests that look at a run between its steps."""

import contextlib

from hdscale.engine.ranks import distributed
from hdscale.training.distill import build_models, start
from hdscale.training.run import check_run


@contextlib.contextmanager
def started(recipe, ds_config, teacher_ds_config):
    """Go the way of `distill` up to the loop."""
    run = check_run(recipe, ds_config)
    models = build_models(run)
    with distributed() as ranks:
        yield start(run, models, ranks, teacher_ds_config)
