"""How fast is this machine? Measures a model's stages, the disk and the kernels."""
