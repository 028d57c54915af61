"""Quality of the river, measured against the backbone."""
