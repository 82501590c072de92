"""Downstream tasks: what a trained model is asked, and how it is scored."""
