"""Benchmarks, run with `python -m benchmarks.NAME`. Each prints its limit first, and one JSON object last."""
