"""Preparing ImageNet for training: from its official files to class folders or indexed tar shards."""
