"""The paper's tables for a model, measured anew: `river-llm reproduce`."""
