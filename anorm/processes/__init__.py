"""Processes: one a device, jobs of a cluster, sweeps; how they start, agree, fail and end."""
