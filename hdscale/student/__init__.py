"""The student and its removable heads."""
