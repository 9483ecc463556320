"""Slurm's commands, faked: sbatch really runs the script in the background, srun its tasks, all here.

The state of jobs lies in $FAKE_SLURM. Not faked: queues, limits, hosts, cgroups; signals are sent by hand.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


class Slurm:
    """A cluster in a folder, for tests."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(folder))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    def jobs(self):
        return sorted(p.stem for p in self.folder.glob("*.json"))

    def job(self, number):
        return json.loads((self.folder / f"{number}.json").read_text())

    def signal(self, number, name="USR2"):
        subprocess.run(["scancel", f"--signal={name}", number], check=True)

    def wait(self, *numbers):
        """The last state of each job."""
        while any(self.job(n)["state"] in ("PENDING", "RUNNING") for n in numbers):
            time.sleep(0.2)
        return [self.job(n)["state"] for n in numbers]


def change(number, **facts):
    path = Path(os.environ["FAKE_SLURM"]) / f"{number}.json"
    known = (json.loads(path.read_text()) if path.exists() else {}) | facts
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(known))
    new.replace(path)
    return known


def sbatch(script):
    text = Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    if "partition" in options and options["partition"] == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    number = str(4000 + len(list(Path(os.environ["FAKE_SLURM"]).glob("*.json"))))
    change(number, state="PENDING", options=options, script=text, starts=0, requeue=False, tasks=[])
    subprocess.Popen(
        [sys.executable, __file__, "daemon", number],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"Submitted batch job {number}")


def daemon(number):
    """Starts a job, again each time that it was requeued."""
    known = change(number)
    if hold := Path(os.environ["FAKE_SLURM"], "hold"):
        while hold.exists():
            time.sleep(0.1)
    nodes = known["options"].get("nodes", "1")
    environment = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_JOB_NODELIST": "localhost",
    }
    while True:
        starts = change(number)["starts"]
        environment["SLURM_RESTART_COUNT"] = str(starts)
        change(number, state="RUNNING", requeue=False, starts=starts + 1)
        status = subprocess.run(["bash", "-c", known["script"]], env=environment).returncode
        if not change(number)["requeue"]:
            break
    change(number, state="COMPLETED" if status == 0 else "FAILED")


def srun(*words):
    words, options = list(words), {}
    while words[0].startswith("--"):
        word = words.pop(0)
        if word == "--output":
            options["output"] = words.pop(0)
    number, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for rank in range(nodes):
        place = {
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": str(nodes),
            "SLURM_STEP_NUM_TASKS": str(nodes),
        }
        with open(options["output"].replace("%j", number).replace("%t", str(rank)), "a") as log:
            tasks.append(subprocess.Popen(words, env=os.environ | place, stdout=log, stderr=log))
    change(number, tasks=[task.pid for task in tasks])
    statuses = [task.wait() for task in tasks]
    sys.exit(any(statuses))


def squeue(*words):
    number = words[words.index("-j") + 1]
    if not (Path(os.environ["FAKE_SLURM"]) / f"{number}.json").exists():
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    print(change(number)["state"])


def scontrol(what, number):
    assert what == "requeue", what
    change(number, requeue=True)


def scancel(option, number):
    for task in change(number)["tasks"]:
        os.kill(task, getattr(signal, "SIG" + option.partition("=")[2]))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
