"""Which patch tokens the student sees, and the store of masks made ahead of training."""
