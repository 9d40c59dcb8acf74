"""Frozen teachers: where they come from, what they see, what they say."""
