"""What a student learned, on held-out samples."""
