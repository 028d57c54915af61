"""What tokens a prompt is, and what text an answer: chat templates, control tokens, ends."""
