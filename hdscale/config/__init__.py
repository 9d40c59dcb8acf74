"""Recipes and DeepSpeed configurations: typed, checked in milliseconds, without torch."""
