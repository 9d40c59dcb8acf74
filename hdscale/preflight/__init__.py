"""Is this cluster fit to train?"""
