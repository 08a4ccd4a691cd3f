"""Programs that make what is shipped; run from the root of the repository."""
