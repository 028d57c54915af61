"""The arms side by side on tasks, a text and in speed, and the report: `river-llm compare`."""
