"""How much compiled functions handle at once."""

from __future__ import annotations

LANES = 16
"""Numbers of a vector."""
LINES_AT_ONCE = 4
"""More than one line is multiplied with a row in groups of so many."""
COLUMNS_AT_ONCE = 4096
"""As many numbers of the lines are multiplied with one row after another: they stay in the processor's first cache."""
ROWS_OF_SUMS = 48
"""Rows that are multiplied with the lines of one tile after another, while the lines are in the first cache."""
MOST_TILE_LINES = 8
"""Lines of a tile, on processors with wide vectors."""
