"""The study on a real Slurm: a cluster of this one machine, a plan of three tiny runs, and a job that is cancelled half-way.

python benchmarks/slurm.py

Needs the programs of Slurm and munge (Debian: `apt-get install slurm-wlm munge`), root, who may start them,
`pip install snakemake-executor-plugin-slurm`, and a corpus (`morph corpus build`). Works in a clone of HEAD in a temporary
folder, with daemons, keys and logs of its own there; for its time /etc/slurm/slurm.conf is its own, and it refuses to start
where there is one. Takes a few minutes. Prints how Slurm says each job ended, and the rows that came of it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parent.parent
SETTINGS = Path("/etc/slurm/slurm.conf")  # the plugin hides the variables of Slurm, and with them any other place, from a job
SHAPE = "1x16/2h/2kv/40ff/257v"
PLAN = "run_id,part,shape,seed,learning_rate,base_width,tokens_per_parameter,cpu_minutes,source\n" + "".join(
    f"{name},fit,{SHAPE},{seed},0.01,16,400,1,tiny\n" for seed, name in enumerate("abc")
)
CONFIGURATION = """ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} CPUs={cores} RealMemory={memory_mb}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_for(condition, seconds: float, what: str) -> None:
    """Ask until it holds; ends the program where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"{what} after {seconds:.0f} s")
        time.sleep(0.2)


def start(folder: Path, stack: ExitStack) -> None:
    """Slurm of one machine, until the stack ends."""
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    memory_mb = psutil.virtual_memory().total // 2**20 - 500
    host = socket.gethostname()
    told = CONFIGURATION.format(folder=folder, host=host, cores=len(os.sched_getaffinity(0)), memory_mb=memory_mb)
    if SETTINGS.exists():
        sys.exit(f"{SETTINGS}: this machine has a Slurm of its own; run this where there is none")
    SETTINGS.parent.mkdir(exist_ok=True)
    stack.callback(SETTINGS.unlink)
    SETTINGS.write_text(told, encoding="utf-8")
    own = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={own['socket']}",
             f"--pid-file={own['pid']}", f"--log-file={own['log']}", f"--seed-file={own['seed']}"]  # fmt: skip
    for name, command in (("munge", munge), ("slurmctld", ["slurmctld", "-D"]), ("slurmd", ["slurmd", "-D", "-N", host])):
        log = stack.enter_context((folder / f"{name}.out").open("w", encoding="utf-8"))
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        if name == "munge":
            wait_for(Path(own["socket"]).exists, 20, "munge made no socket")
    wait_for(lambda: "idle" in said(["sinfo", "--noheader", "--format=%T"]), 60, "Slurm is not ready")


def said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that the daemons end with it
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        start(folder, stack)
        clone, plan, table = folder / "clone", folder / "plan.csv", folder / "runs.csv"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        plan.write_text(PLAN, encoding="utf-8")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(clone), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "snakemake", "study", "--executor", "slurm", "--slurm-no-account",
                   "--slurm-status-command", "squeue", "--cores", "all", "--jobs", "2", "--config", f"plan={plan}",
                   f"table={table}"]  # fmt: skip
        began_s = time.monotonic()
        log = stack.enter_context((folder / "snakemake.out").open("w", encoding="utf-8"))
        run = subprocess.Popen(command, cwd=clone, stdout=log, stderr=log)
        stack.callback(run.kill)  # it would wait for its jobs for ever
        checkpoints = clone / "_build/study/a"
        wait_for(lambda: list(checkpoints.glob("checkpoint-*")) or run.poll() is not None, 300, "run a has no checkpoint")
        jobs = said(["squeue", "--noheader", "--states=RUNNING", "--format=%A %k"]).splitlines()
        cancelled = next(job.split()[0] for job in jobs if job.endswith("_a"))
        subprocess.run(["scancel", cancelled], check=True)
        print(f"cancelled job {cancelled}, of run a, after its first checkpoint")
        code = run.wait()
        text = (folder / "snakemake.out").read_text(encoding="utf-8")
        print("\n".join(line for line in text.splitlines() if "steps (" in line or "Trying to restart" in line))
        ended = said(["scontrol", "show", "job", "--oneliner"]).splitlines()
        fields = [dict(field.partition("=")[::2] for field in job.split()) for job in ended]
        print(pd.DataFrame(fields)[["JobId", "Comment", "JobState", "RunTime", "NumCPUs"]].to_string(index=False))
        rows = pd.read_csv(table)
        print(f"snakemake: exit {code} after {time.monotonic() - began_s:.0f} s; rows of {', '.join(rows['run_id'])}")


if __name__ == "__main__":
    main()
