"""Training: state, optimizer, step, checkpoints, metrics and the loop."""
