"""Disk to buffer: the checkpoint's tensors, the reader that fetches them and the buffers they land in."""
