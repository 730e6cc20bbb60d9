"""Where strategies meet transformers: the cache, its layers, the attention function, sessions."""
