"""How fast the loader is, and what ranks hold and send."""
