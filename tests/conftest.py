"""Small runs, trained once for all tests that read runs."""

from anorm.openmp import let_threads_sleep

let_threads_sleep()  # before a test imports torch

import pytest
from commands import SMALL, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder of finished runs: batch and group normalization, seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("trained")
    for norm in ("bn", "gn"):
        for seed in (0, 1):
            assert train(*SMALL, f"norm={norm}", f"seed={seed}", f"run_dir={folder}/{norm}-{seed}") == 0
    return folder
