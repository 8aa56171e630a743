"""Tasks for lm-evaluation-harness, for `python -m longact eval` or its own `--include_path`."""
