"""The trainer: fit, evaluate, record, checkpoint."""
