"""Measurements of mixpool; each module is a command, `python -m benchmarks.NAME`, that writes a file of records."""
