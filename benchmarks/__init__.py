"""Measurements of mixpool: a folder per question, `python -m benchmarks.QUESTION`; records lie in `records/`."""
