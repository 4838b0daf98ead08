"""Export of GGUF files: the llama family of decoders."""
