"""The daemon: builds the parts, joins them, faces people and programs."""
