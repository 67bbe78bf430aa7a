"""Every k-th failure: a scenario runs again and again, and each time another point of it fails.

After SQLite's test harness. `points` counts and fails, `scenarios` are plain coroutines, `stand` runs one scenario with
one fault and checks that nothing is left, and `every_failure` tries all faults.
"""
