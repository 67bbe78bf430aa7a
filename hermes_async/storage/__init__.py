"""Where do bytes lie, and how do they get into a buffer? Checkpoints, reads, buffers, and KV on disk."""
