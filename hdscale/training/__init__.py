"""The loop, and the kinds of run."""
