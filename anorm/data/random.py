"""Independent random streams, each named by (seed, purpose, keys): nothing has to be replayed to resume a run."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, *keys: int) -> int:
    """Return a 63-bit seed: BLAKE2b of "purpose/seed/key/key...", the same on every machine and Python version."""
    assert "/" not in purpose, purpose
    name = "/".join([purpose, str(int(seed)), *(str(int(key)) for key in keys)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """Return a CPU generator for one purpose ("order", "augment", "mix", "init", ...) and its keys (epoch, index, ...).

    It costs about 4 microseconds, so each image has its own. PyTorch's CPU generator uses 32 bits of the seed. So two of
    the 10^8 images of a long run may share their draws, which no experiment can see.
    """
    return torch.Generator().manual_seed(seed_of(seed, purpose, *keys))
