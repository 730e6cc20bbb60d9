"""Pure tensors: the types, the interfaces, the strategy and the registry. Never imports transformers."""
