"""Data: sources (what the samples are), loaders (in which order and batches they come), feeds (how they reach the device).

Everything random derives from (seed, purpose, epoch, index) (`random.stream`), so what a run sees depends neither on
the number of workers or processes nor on where the run was cut and resumed.
"""
