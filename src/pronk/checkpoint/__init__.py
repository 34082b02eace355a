"""Foreign files in and out: GGUF and Hugging Face checkpoints as a ModelSpec and named tensors."""
