"""Who is there: the launcher, its hosts, the ranks that arrive, this rank's device."""
