"""One forward for any timm vision transformer."""
