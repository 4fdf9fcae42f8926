"""Finding peers, choosing one, asking it."""
