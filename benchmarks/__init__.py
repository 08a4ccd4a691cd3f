"""Programs that measure, each printing what it measured."""
