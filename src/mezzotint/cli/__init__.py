"""The command line: one file per command, each only a translation into the Python API."""
