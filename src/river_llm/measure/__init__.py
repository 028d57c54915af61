"""What the river does: speed, quality on given text, the model of lm-eval."""
