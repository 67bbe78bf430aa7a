"""Logits to user: the scheduler, sessions and the engine that owns them."""
