"""The trainer: compose and sign a configuration, launch one process a device, fit, evaluate, record, checkpoint."""
