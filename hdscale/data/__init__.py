"""Shards, their index, the order of samples, augmented views, and the loader."""
