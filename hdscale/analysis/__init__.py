"""What attention has learned: distances, diversity."""
