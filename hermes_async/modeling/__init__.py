"""Ready stage to logits: the transformers model on the meta device, its attention, KV caches and the sampler."""
