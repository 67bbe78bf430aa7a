"""Makes a checkpoint of fewer bytes from another one."""
