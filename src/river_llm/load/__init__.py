"""A model of `transformers` by its name: of a folder, the Hub or a GGUF file, whole or refused."""
