"""Who started this process, and as which of several."""

from anorm.processes.launch import first_host, joined_by_others


def test_a_batch_script_is_no_task_of_srun(monkeypatch):
    for key, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(key, value)
    with joined_by_others() as world:
        assert world is None


def test_first_host_of_a_slurm_list():
    for listed, first in {
        "gpu3": "gpu3",
        "gpu[003-007,12],cpu1": "gpu003",
        "a1,b2": "a1",
        "n[5,7]-ib": "n5-ib",
    }.items():
        assert first_host(listed) == first
