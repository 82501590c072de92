"""Image-text pairs: from files to batches."""
