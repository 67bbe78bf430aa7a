"""What does this machine do? Measures a model's stages, the disk and the kernels."""
