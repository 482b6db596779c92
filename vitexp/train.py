"""One run from start to end. `fit` is the whole experiment: read it from top to bottom."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vitexp import checkpoint, reports, run_folder, runtime
from vitexp.config import CONFIG_NAME, RAW_NAME, RunConfig, to_yaml
from vitexp.data.batch_transforms import on_device
from vitexp.data.images import changes as data_changes
from vitexp.data.loader import eval_batches, train_batches
from vitexp.data.sampler import effective_batch_size, micro_batches_per_epoch
from vitexp.ema import Ema
from vitexp.errors import UserError
from vitexp.finite import FiniteGuard
from vitexp.horizon import Horizon, Update, plan_horizon
from vitexp.optim import build_optimizer, resolve_lr, set_lr
from vitexp.profiling import make_profiler
from vitexp.run import Run, build_run
from vitexp.seeding import derive_seed
from vitexp.signals import Interrupted, StopRequest
from vitexp.state import State, Tally
from vitexp.types import Batch

log = logging.getLogger("vitexp")

EMA_WARMUP_POWER = 2 / 3  # of train.ema_warmup: timm's


def train(config: RunConfig) -> dict[str, Any]:
    """Starts, or goes on with, the run that the settings describe, and returns what its summary.json holds.

    Raises UserError for what a person can mend and Interrupted when asked to stop. The run folder is whole then."""
    folder = Path(config.output_dir).expanduser().absolute()
    with StopRequest() as stop, contextlib.ExitStack() as held:
        accelerator = runtime.make_accelerator(
            precision=config.runtime.precision, device=config.runtime.device, threads=config.runtime.threads
        )
        held.callback(accelerator.end_training)
        try:
            found = where_it_stands(config, folder, accelerator, held)
            run = build_run(config)
            return fit(run, folder, accelerator=accelerator, stop=stop, found=found)
        except Exception:
            log.debug("the run ended here", exc_info=True)  # the traceback is for train.log, not for the terminal
            raise


def where_it_stands(
    config: RunConfig, folder: Path, accelerator: Accelerator, held: contextlib.ExitStack
) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, the same one for every rank, or None for a run that starts.

    The first rank takes the folder for itself, until `held` is closed, and writes config.yaml. Raises UserError when
    another process has it, when resume=must finds nothing, or when settings that change results differ."""
    decided: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            held.enter_context(run_folder.RunLock(folder))
            held.enter_context(reports.log_to(folder / "train.log"))
            decided[0] = _resume_point(config, folder)
        except UserError as error:  # told to every rank, or the others would wait for this one
            decided[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(decided)
    if decided[1]:
        raise UserError(decided[1])
    return decided[0]


def _resume_point(config: RunConfig, folder: Path) -> checkpoint.Checkpoint | None:
    found = None if config.resume == "never" else checkpoint.resume_point(folder / "checkpoints")
    if found is None and config.resume == "must":
        raise UserError(f"resume=must: {folder} holds no checkpoint to go on from")
    changed = _changed_settings(config, folder)
    if found is not None and changed and not config.allow_changes:
        raise UserError(
            f"{folder} was started with other settings: {'; '.join(changed[:4])}"
            f"{f' and {len(changed) - 4} more' if len(changed) > 4 else ''}\n"
            "give another output_dir, or allow_changes=true to go on with the new ones"
        )
    # A run killed before its first checkpoint starts again in its place, and in its MLflow run.
    if found is None and (changed or config.resume == "never"):
        _check_was_a_run(folder)
        moved = run_folder.archive_previous(folder, spare=("train.log",))
        if moved is not None:
            log.info("set aside   the former run of this folder is now in %s", moved)
    run_folder.write_atomic(folder / CONFIG_NAME, to_yaml(config.resolved))
    raw = {**config.raw, "output_dir": config.output_dir, "choices": config.choices}
    run_folder.write_atomic(folder / RAW_NAME, to_yaml(raw))
    return found


def _check_was_a_run(folder: Path) -> None:
    """Raises UserError where files lie that no run left, such as a person's own, which nobody wants set aside."""
    signs = (CONFIG_NAME, "checkpoints", "metrics.jsonl", run_folder.PREVIOUS_NAME)
    own = ("train.log", run_folder.LOCK_NAME)  # this run has written those already
    found = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if found and not any((folder / sign).exists() for sign in signs):
        shown = ", ".join(found[:3]) + ", …" * (len(found) > 3)
        raise UserError(f"output_dir={folder}: holds files that no run left ({shown}); give a folder of its own")


def _changed_settings(config: RunConfig, folder: Path) -> list[str]:
    """What differs from the settings in the folder and could change results; all of it when they cannot be read."""
    if not (folder / CONFIG_NAME).exists():
        return ["config.yaml: none"] if run_folder.is_used(folder, spare=("train.log",)) else []
    try:
        before = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return ["config.yaml: cannot be read"]
    return checkpoint.changed_config(_comparable(before), _comparable(config.resolved))


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resolved.items() if key != "choices"}


def fit(
    run: Run,
    folder: Path,
    *,
    accelerator: Accelerator,
    stop: StopRequest,
    found: checkpoint.Checkpoint | None,
) -> dict[str, Any]:
    """Trains to the end and returns the summary. Every rank runs this; only the first writes and shows."""
    config, settings = run.config, run.config.train
    world, rank, first = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process

    # ---- How long: which micro-batches make each update -------------------------------------------------------------
    count, repeats = len(run.train_data), settings.repeats
    batch_size = effective_batch_size(count, settings.batch_size, world, repeats=repeats)
    if batch_size < settings.batch_size:
        run.notes.append(f"train.batch_size={settings.batch_size} is more than there is: batches hold {batch_size}")
    horizon = plan_horizon(
        micro_batches_per_epoch(count, batch_size, world, repeats=repeats),
        accumulate=settings.accumulate,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    if not config.stage.trains:
        horizon = replace(horizon, num_updates=0)
    eval_every = settings.eval_every or horizon.updates_per_epoch
    save_every = settings.save_every or horizon.updates_per_epoch

    # ---- What learns, and how ---------------------------------------------------------------------------------------
    global_batch = batch_size * world * settings.accumulate
    rates = {key: config.optim[key] for key in ("lr", "base_lr", "reference_batch")}
    peak_lr = resolve_lr(**rates, global_batch=global_batch)
    method, optimizer = prepare(run, accelerator, lr=peak_lr)
    guard = FiniteGuard(
        optimizer,
        deferred=accelerator.device.type != "cpu" and accelerator.scaler is None,
        names=run.source.train.names,
    )
    parameters = [p for p in run.method.parameters() if p.requires_grad]
    clipped = run.method.clipped()
    power = EMA_WARMUP_POWER if settings.ema_warmup else 0.0
    ema = None if settings.ema_decay is None else Ema(run.method, decay=settings.ema_decay, warmup_power=power)
    data = {key: torch.from_numpy(digest) for key, digest in run.digests().items()} if first else {}
    state = State(run.method, optimizer, ema, accelerator.scaler, data=data, evaluated=config.stage.trains)

    # ---- Where it was -----------------------------------------------------------------------------------------------
    if found is not None:
        checkpoint.check_compatible(found, run.method.state_dict(), classes=run.source.classes, world_size=world)
        saved = checkpoint.load(found)
        state.restore(saved, accelerator.device)
        if first and "data" in saved:
            old, new = ({key: value.numpy() for key, value in side.items()} for side in (saved["data"], data))
            if changed := data_changes(old, new):
                log.warning(
                    "the data has changed since this run's checkpoint (%s); it goes on with what is there", changed
                )

    # ---- Books: metrics.jsonl, MLflow, the display; kept by the first rank alone ------------------------------------
    if state.step >= horizon.num_updates and state.evaluated and (folder / "summary.json").exists():
        return reports.already_done(folder) if first else {}
    books: reports.Books | reports.NoBooks = reports.NoBooks()
    if first:
        facts = reports.facts_of(
            run,
            horizon,
            lr=peak_lr,
            global_batch=global_batch,
            precision=accelerator.mixed_precision,
            device=accelerator.device.type,
            processes=world,
        )
        books = reports.Books(run, folder, horizon, facts=facts, state=state, resumed=found is not None)
    batches = train_batches(
        run.train_data,
        batch_size=batch_size,
        seed=config.seed,
        start=horizon.micro_batches_before(state.step),
        rank=rank,
        world=world,
        workers=settings.workers,
        repeats=repeats,
    )
    profiler = make_profiler(folder / "profile", updates=config.runtime.profile if first else None)
    status = "FAILED"
    try:
        # Signals from here on are looked at after each step: weights and books change together or not at all.
        stop.deferred = True
        if not state.evaluated:  # stopped between an update and the evaluation due after it
            evaluate(run, state, horizon, books=books, accelerator=accelerator, stop=stop)

        run.method.train()  # here and after an evaluation: a walk through all modules is too much for every step

        # ---- The loop: one pass is one update -----------------------------------------------------------------------
        while state.step < horizon.num_updates:
            update = horizon.update(state.step)
            lr = run.schedule(update.progress, lr=peak_lr)
            set_lr(optimizer, lr)

            position = horizon.micro_batches_before(state.step)
            loss, index = gradients(
                run, method, batches, update, position=position, accelerator=accelerator, tally=state.tally
            )
            guard.admit(state.step, loss, index)
            if settings.clip_norm is not None:
                accelerator.unscale_gradients()  # fp16's
                state.tally.add("grad_norm", nn.utils.clip_grad_norm_(clipped, settings.clip_norm))
            optimizer.step()
            optimizer.zero_grad()
            run.method.after_step(update.progress)
            if ema is not None:
                ema.update(state.step)
            state.tally.add("loss", loss)
            state.tally.updates += 1
            state.step += 1
            books.stepped(state.step)
            profiler.step()

            # ---- What is due after it -------------------------------------------------------------------------------
            ended = state.step == horizon.num_updates
            state.evaluated = not (ended or state.step % eval_every == 0)
            if ended or state.step % settings.log_every == 0:
                guard.look()
                books.trained(horizon.progress(state.step), state.tally.means(prefix="train/") | {"train/lr": lr})
            asked = stop_asked(stop, accelerator)
            if not state.evaluated and not asked:
                try:
                    evaluate(run, state, horizon, books=books, accelerator=accelerator, stop=stop)
                except Interrupted as stopped:
                    asked = stopped.signum
            if ended or asked or state.step % save_every == 0:
                guard.look()
                guard.check_weights(parameters, state.step)
                books.save(state, keep=settings.keep, world=world)
                accelerator.wait_for_everyone()
            if asked:
                raise Interrupted(asked)

        # ---- The end ------------------------------------------------------------------------------------------------
        summary = books.finish(state)
        status = "FINISHED"
        return summary
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        stop.deferred = False
        books.close(status)
        profiler.stop()


def prepare(run: Run, accelerator: Accelerator, *, lr: float) -> tuple[nn.Module, Any]:
    """The method on its device, wrapped for the ranks, and its optimizer, wrapped only where gradients are scaled."""
    grouping = {key: run.config.optim[key] for key in ("weight_decay", "layer_decay", "no_decay")}
    run.method.to(accelerator.device)
    optimizer = build_optimizer(run.make_optimizer, run.method, lr=lr, **grouping)
    if run.config.runtime.compile:
        (run.backbone if run.method.whole is None else run.method.whole).compile()
        run.notes.append("torch.compile: the first step takes about a minute")
    method, wrapped = accelerator.prepare(run.method, optimizer)
    # The wrapper looks for a package on disk at each step: 0.1 ms for nothing else.
    return method, optimizer if accelerator.scaler is None else wrapped


def gradients(
    run: Run,
    method: nn.Module,
    batches: Iterator[Batch],
    update: Update,
    *,
    position: int,
    accelerator: Accelerator,
    tally: Tally,
) -> tuple[Tensor, Tensor]:
    """Forwards and backwards of one update, the first of them the run's `position`-th of this rank: gradients are their
    mean's afterwards. Returns the mean loss and the pictures' numbers; what the method measured is in the tally."""
    seed, rank = run.config.seed, accelerator.process_index
    losses, indices = [], []
    for number in range(update.num_micro_batches):
        batch = ready(next(batches), run, accelerator.device)
        if run.mix is not None:
            mix_seed = derive_seed(seed, position + number, rank, 0x313)
            batch = run.mix(batch, num_classes=run.architecture["num_classes"], seed=mix_seed)
        runtime.seed_forward(seed, position + number, rank)
        last = number + 1 == update.num_micro_batches
        with contextlib.nullcontext() if last else accelerator.no_sync(method):
            output = method(batch, update.progress)
            accelerator.backward(output.loss / update.num_micro_batches)
        losses.append(output.loss.detach())
        indices.append(batch.index)
        for name, value in output.metrics.items():
            tally.add(name, value / update.num_micro_batches)
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), torch.cat(indices)


def ready(batch: Batch, run: Run, device: torch.device) -> Batch:
    """The batch on the device, normalised as this run's model wants it."""
    return on_device(batch, device, mean=run.preprocessing["mean"], std=run.preprocessing["std"])


def evaluate(
    run: Run,
    state: State,
    horizon: Horizon,
    *,
    books: reports.Books | reports.NoBooks,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Measures the validation split with the weights, and with their average where there is one, and records it."""
    with books.pause():
        how = {"accelerator": accelerator, "stop": stop, "tell": books.evaluating}
        metrics, arrays = measure(run, "val", **how)
        keep_best(state, books, metrics, prefix="val", filename=reports.BEST_WEIGHTS)
        if state.ema is not None:
            with state.ema.swapped_in():
                averaged, _ = measure(run, "val_ema", **how)
                keep_best(state, books, averaged, prefix="val_ema", filename=reports.AVERAGED_WEIGHTS)
            metrics |= averaged
        run.method.train()
        state.evaluated = True
        if metrics:
            books.evaluated(horizon.progress(state.step), metrics, arrays)


def keep_best(
    state: State, books: reports.Books | reports.NoBooks, metrics: dict[str, float], *, prefix: str, filename: str
) -> None:
    """Exports the weights that the model has where their accuracy is the best so far, and notes what was found of them.

    The weights and their average each have a best of their own: `best/val/top1` and `best/val_ema/top1`."""
    judge = f"{prefix}/top1"
    if metrics.get(judge, -1.0) > state.best.get(f"best/{judge}", -1.0):
        step = "best/step" if prefix == "val" else f"best/{prefix}/step"
        state.best |= {step: state.step, **{f"best/{name}": value for name, value in metrics.items()}}
        books.export(metrics, filename=filename)


def measure(
    run: Run,
    prefix: str,
    *,
    accelerator: Accelerator,
    stop: StopRequest | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """What the evaluators find on the validation split with the method as it is, named `<prefix>/<name>`.

    tell hears how many pictures of this rank's share are done. Raises Interrupted when asked to stop in the midst."""
    metrics: dict[str, float] = {}
    arrays: dict[str, Any] = {}
    if run.val_data is None:
        return metrics, arrays
    # Several ranks meet after their own share: one that left early would leave the others waiting.
    heeded = stop if accelerator.num_processes == 1 else None

    def batches(split: str) -> Iterator[Batch]:
        data = {"val": run.val_data, "train": run.reference_data}[split]
        assert data is not None
        share = -(-len(data) // accelerator.num_processes)
        walked = eval_batches(
            data,
            batch_size=run.config.train.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=run.config.train.workers,
        )
        watched = _watched(walked, heeded, lambda done: tell(done, share))
        return (ready(batch, run, accelerator.device) for batch in watched)

    for evaluator in run.evaluators.values():
        found = evaluator(run.method, batches, accelerator, run.source.classes)
        metrics |= {f"{prefix}/{name}": value for name, value in found.metrics.items()}
        arrays |= {f"{prefix}/{name}": value for name, value in found.arrays.items()}
    return metrics, arrays


def _watched(batches: Iterable[Batch], stop: StopRequest | None, tell: Callable[[int], None]) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        if stop is not None:
            stop.check()
        yield batch
        done += len(batch.index)
        tell(done)


def stop_asked(stop: StopRequest, accelerator: Accelerator) -> int | None:
    """The signal that any rank has received, on every rank, or None."""
    asked = stop.signum
    if accelerator.num_processes > 1:
        shared = torch.tensor(asked or 0, device=accelerator.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        asked = int(shared) or None
    return asked
