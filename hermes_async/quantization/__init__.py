"""Weights that are stored in fewer bits: how they are stored, and how they become numbers again."""
