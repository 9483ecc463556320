"""Detectors with any norm: Mask R-CNN, Cascade Mask R-CNN, HTC over a feature pyramid."""
