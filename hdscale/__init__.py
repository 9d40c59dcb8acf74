"""Hybrid Distillation of large vision transformers on many machines."""

__version__ = "0.1.0"
