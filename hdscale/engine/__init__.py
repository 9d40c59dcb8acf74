"""Ranks, DeepSpeed engines, schedule, checkpoints, metrics and the training loop."""
