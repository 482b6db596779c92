"""What a sweep costs beside a bare shell loop: the same runs, as many at a time, on the wall clock.

The loop is `xargs -P`, each run with the cores that the sweep would give it. Runs on the digits, with MLflow.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import parser, start

from vitexp.sweeps.local import cores_here, shares

JOBS, EPOCHS = 10, 4
GOAL = 1.10


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--at-a-time", type=int, default=2, help="runs side by side")
    arguments = made.parse_args()
    start(arguments)
    jobs, rounds = (2, 1) if arguments.quick else (JOBS, arguments.rounds or 2)
    settings = [f"train.epochs={1 if arguments.quick else EPOCHS}", "name=sweep_benchmark"]
    print(f"{jobs} runs, {arguments.at_a_time} at a time, {rounds} turns; the wall clock, seconds a turn")
    ratios = []
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            loop = seconds(lambda at=place: shell_loop(settings, jobs, arguments.at_a_time, Path(at) / "loop"))
            swept = seconds(lambda at=place: sweep(settings, jobs, arguments.at_a_time, Path(at) / "sweep"))
        ratios.append(swept / loop)
        print(f"turn {turn}   shell loop {loop:7.1f}   sweep {swept:7.1f}   ratio {ratios[-1]:.3f}", flush=True)
    print(f"ratio {sum(ratios) / rounds:.3f} (goal: at most {GOAL})")


def shell_loop(settings: list[str], jobs: int, at_a_time: int, folder: Path) -> None:
    """`xargs` starts the next run when one ends; its slot decides which cores the run has."""
    cores = [",".join(map(str, share.cores)) for share in shares(at_a_time, cores=cores_here(), gpus=[])]
    threads = len(shares(at_a_time, cores=cores_here(), gpus=[])[0].cores)
    choose = f"cores=({' '.join(cores)}); OMP_NUM_THREADS={threads} taskset -c ${{cores[$SLOT]}}"
    run = shlex.join([sys.executable, "-m", "vitexp", *settings])
    script = f"{choose} {run} seed=$0 output_dir={shlex.quote(str(folder))}/seed-$0"
    subprocess.run(
        ["xargs", "-n1", f"-P{at_a_time}", "--process-slot-var=SLOT", "bash", "-c", script],
        input="\n".join(map(str, range(jobs))),
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_made(folder),
    )


def sweep(settings: list[str], jobs: int, at_a_time: int, folder: Path) -> None:
    command = [sys.executable, "-m", "vitexp", "--multirun", *settings, f"seed=range({jobs})"]
    subprocess.run(
        [*command, f"sweep.jobs={at_a_time}", f"output_dir={folder}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_made(folder),
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
    )


def _made(folder: Path) -> Path:
    """The folder in which the runs begin, so that their MLflow store is one of their own."""
    folder.mkdir(parents=True)
    return folder


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
