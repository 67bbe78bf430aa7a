"""Timings, each against its physical limit. `python -m benchmarks.NAME`; one JSON object is the last line printed."""
