"""What the river does to quality: tasks, given text, and how sure a figure is."""
