"""`python -m vitexp plan` of a sweep (`plan optim=adam,sgd seed=0,1`) or of a pipeline (`plan pipeline=mae`): how many
runs there are, how long each and all of them take, and what they leave on disk. Raises UserError after that where the
disk cannot hold it. Settings that cost the same are measured once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

import torch

from vitexp import pipeline
from vitexp.commands import plan
from vitexp.config import pipeline_settings
from vitexp.costs import DiskBytes, disk_needed, free_disk
from vitexp.data.memory import cores
from vitexp.errors import UserError
from vitexp.room import Costs, Member, Sweep, alike, check_room, members_of_sweep

ALL_PROBES_S, SHORTEST_PROBE_S = 30.0, 2.0
# Of a run, and of all of it: how long one update takes is the same.
LENGTH = ("train.epochs", "train.max_steps", "train.eval_every", "train.save_every", "train.keep", "train.log_every")
LENGTH += ("train.fraction", "evaluators", "tracking")


def main(arguments: list[str], config_dir: str | None) -> int:
    """Prints the plan of what the overrides describe: a pipeline, a sweep, or one run."""
    own = {text.partition("=")[0]: text for text in arguments if text.partition("=")[0] in plan.KEYS}
    overrides = [text for text in arguments if text not in own.values()]
    if "run" in own:
        return plan.main(arguments, config_dir)
    is_pipeline = pipeline_settings(overrides, config_dir) is not None
    sweep = Sweep.of(overrides, config_dir)
    if not is_pipeline and not sweep.is_many:
        return plan.main(arguments, config_dir)
    for key in ("plot", "uri"):
        if key in own:
            raise UserError(f"{own[key]}: is for the plan of one run")
    probe = plan.parse_probe(own["probe"].partition("=")[2] if "probe" in own else None)
    if is_pipeline:
        return plan_pipeline(overrides, config_dir, probe=probe)
    return plan_sweep(sweep, config_dir, probe=probe)


def plan_sweep(sweep: Sweep, config_dir: str | None, *, probe: bool | None) -> int:
    members = members_of_sweep(sweep, config_dir)
    at_a_time = min(sweep.jobs, len(members))
    runs = f"{len(members)} runs" if sweep.trials is None else f"a search of {sweep.trials} trials, each to its end"
    plan.show("sweep", f"{runs}, {at_a_time} at a time")
    return tell(members, at_a_time=at_a_time, probe=probe)


def plan_pipeline(overrides: list[str], config_dir: str | None, *, probe: bool | None) -> int:
    planned = pipeline.plan(overrides, config_dir)
    folder = pipeline.folder_of(planned, overrides, config_dir)
    members = members_of_pipeline(planned, folder, config_dir)
    finished = [stage.name for stage in planned.stages if stage.run is not None]
    labelings = [stage.name for stage in planned.stages if isinstance(stage, pipeline.LabelStage)]
    plan.show("pipeline", f"{planned.name}: {len(planned.stages)} stages, one after another")
    for name in finished:
        plan.show("", f"{name} is a finished run")
    for name in labelings:
        plan.show("", f"{name} makes label maps, whose time and disk are not counted")
    return tell(members, at_a_time=1, probe=probe)


def members_of_pipeline(planned: pipeline.Pipeline, folder: Path, config_dir: str | None) -> list[Member]:
    """The stages that are runs and are to be run."""
    members: dict[str, Member] = {}
    for stage in planned.stages:
        if stage.run is None and not isinstance(stage, pipeline.LabelStage):
            teacher = None if stage.teacher is None else members.get(stage.teacher.name)
            config = stage.config(folder, config_dir)
            members[stage.name] = Member(stage.name, config, stage.place(folder), teacher)
    return list(members.values())


# ---- what they cost --------------------------------------------------------------------------------------------------


def tell(members: Sequence[Member], *, at_a_time: int, probe: bool | None) -> int:
    """Prints a row for all that cost the same, and the sums. Raises UserError where the disk cannot hold it."""
    if not members:
        raise UserError("there is no run to plan")
    place, costs = members[0].folder.parent, Costs()
    plan.show("folder", str(place))
    disks = [costs.disk(member) for member in members]
    times = times_of(members, costs, at_a_time=at_a_time, probe=probe)
    rows: dict[tuple[str, float | str, int], int] = {}
    for member, time, disk in zip(members, times, disks, strict=True):
        row = (member.name, time, disk.left)
        rows[row] = rows.get(row, 0) + 1
    print(f"\n{'runs':>6}  {'time each':>12}  {'disk each':>12}  which")
    for (name, time, left), count in rows.items():
        shown = "?" if isinstance(time, str) else plan.lasting(time) if time else "-"
        print(f"{count:>6}  {shown:>12}  {plan.size(left):>12}  {name}")
    print()
    known = [time for time in times if not isinstance(time, str)]
    whys = {time: None for time in times if isinstance(time, str)}
    if known and any(known):
        least = "at least " if whys else ""
        plan.show(
            "time",
            f"{least}{plan.lasting(makespan(known, at_a_time))} of updates in all; reading pictures, evaluating and "
            "saving come on top",
        )
    for why in whys:
        plan.show("" if known and any(known) else "time", why)
    plan.show("disk", _disk(disks, at_a_time, place))
    check_room(members, at_a_time=at_a_time, costs=costs)
    return 0


def times_of(members: Sequence[Member], costs: Costs, *, at_a_time: int, probe: bool | None) -> list[float | str]:
    """Seconds of each member's updates, or why they are not known; each kind of update is measured once."""
    kinds = {alike(member.config, besides=LENGTH): member for member in members}
    seconds = max(SHORTEST_PROBE_S, min(plan.PROBE_S, ALL_PROBES_S / len(kinds)))
    measured = {
        kind: _speed(member, costs, at_a_time=at_a_time, probe=probe, seconds=seconds) for kind, member in kinds.items()
    }
    times: list[float | str] = []
    for member in members:
        speed, slower = measured[alike(member.config, besides=LENGTH)]
        times.append(speed if isinstance(speed, str) else slower * plan.seconds_of(costs.planned(member), speed))
    return times


def _speed(
    member: Member, costs: Costs, *, at_a_time: int, probe: bool | None, seconds: float
) -> tuple[plan.Speed | str, float]:
    """The speed of one that has its share of the machine, and how many such runs have to share each core or GPU."""
    planned = costs.planned(member)
    if not planned.horizon.num_updates:
        return plan.Speed(batch_size=1, forward_s=0.0, update_s=0.0, rounds=0), 1.0
    accelerator = plan.accelerator_of(member.config, side_by_side=at_a_time)
    try:
        gpus = accelerator.device.type == "cuda"
        places = torch.cuda.device_count() if gpus else cores()
        slower = max(1.0, at_a_time * member.config.runtime.processes / max(1, places))
        work = plan.work_of(planned, accelerator)
        found = plan.speed_or_why(planned, accelerator, plan.held_by(planned), work, probe=probe, seconds=seconds)
        return found, slower
    finally:
        accelerator.end_training()


def makespan(times: Sequence[float], at_a_time: int) -> float:
    """Seconds until the last one ends, where each begins as soon as there is a place."""
    free_at = [0.0] * at_a_time
    for time in times:
        heapq.heappush(free_at, heapq.heappop(free_at) + time)
    return max(free_at)


def _disk(disks: Sequence[DiskBytes], at_a_time: int, place: Path) -> str:
    checkpoints = sum(one.checkpoints * one.checkpoint for one in disks)
    logged = sum(one.logged for one in disks)
    parts = f"checkpoints {plan.size(checkpoints)}, weights {plan.size(sum(one.weights for one in disks))}"
    if logged:
        parts += f", copies for MLflow {plan.size(logged)}"
    return f"{plan.size(disk_needed(disks, at_a_time=at_a_time))} at most: {parts}; {plan.size(free_disk(place))} free"
