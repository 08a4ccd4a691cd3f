"""Train the models that are shipped, in pieces of a time budget that go on with one another."""
