"""Programs to run and to read: ``python -m gpulayers.examples.<name>``."""
