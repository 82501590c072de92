"""What leaves a run: weights for use elsewhere, pictures and the report."""
