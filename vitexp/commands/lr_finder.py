"""`python -m vitexp lr_finder [overrides]`: at which learning rates a run would learn, from one sweep through them.

`lr_min`, `lr_max` and `steps` say how far and how finely. `output` is a folder for lr_finder.png and lr_finder.json;
nothing else is written, no run is made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitexp import plots
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.lr_finder import SAFETY, Suggestion, Sweep, exponential_rates, overrides_for, suggest, sweep
from vitexp.progress import Display
from vitexp.run import Run, build_run
from vitexp.run_folder import make_folder, write_atomic
from vitexp.runtime import make_accelerator

KEYS = ("lr_min", "lr_max", "steps", "output")
LR_MIN, LR_MAX, STEPS = 1e-7, 1.0, 100
FEWEST_STEPS = 10


def main(arguments: list[str], config_dir: str | None) -> int:
    """Makes the sweep that these overrides describe, draws it and prints what it suggests. Raises UserError."""
    pairs = [text.partition("=")[::2] for text in arguments]
    given = {key: value for key, value in pairs if key in KEYS}
    rates = exponential_rates(*_span(given))
    config = compose_and_check(
        [text for text, (key, _) in zip(arguments, pairs, strict=True) if key not in KEYS], config_dir
    )
    if not config.stage.trains:
        raise UserError(f"stage={config.stage.name}: trains nothing, so there is no learning rate to find")
    folder = _folder(given.get("output"), Path(config.output_dir).name)
    runtime = config.runtime
    accelerator = make_accelerator(precision=runtime.precision, device=runtime.device, threads=runtime.threads)
    try:
        run = build_run(replace(config, evaluators={}))  # nothing is measured but the training loss
        print("settings   ", " ".join(f"{group}={option}" for group, option in config.choices.items()), flush=True)
        with Display(total=len(rates)) as display:

            def tell(done: int, loss: float, lr: float) -> None:
                display.log({"train/loss": loss, "train/lr": lr})
                display.step(done)

            found = sweep(run, rates, accelerator=accelerator, tell=tell)
    finally:
        accelerator.end_training()
    report(run, found, suggest(found), folder)
    return 0


def report(run: Run, found: Sweep, advice: Suggestion | None, folder: Path) -> None:
    """Prints what the sweep says, and leaves it in the folder as a picture and as numbers."""
    optim, processes = run.config.optim, run.config.runtime.processes
    start, end = (f"{rate:.3g}" for rate in (found.rates[0], found.rates[-1])) if found.rates else ("-", "-")
    by = f", those of {processes} processes in this one" if processes > 1 else ""
    print(f"swept       {len(found.rates)} updates of {found.global_batch:,} pictures{by} from {start} to {end}")
    print(f"ended       {found.ended}")
    pasted: dict[str, list[str]] = {}
    if advice is None:
        print("suggestion  none: the loss never fell by more than its noise; try other lr_min, lr_max or more steps")
    else:
        named = {"steepest": advice.steepest, "tenth": advice.tenth}
        pasted = {name: overrides_for(rate, optim, global_batch=found.global_batch) for name, rate in named.items()}
        print("suggestion  steepest: where the loss falls fastest; tenth: a tenth of the rate of the least loss")
        for name, words in pasted.items():
            print(f"  {name:<10}{'   or   '.join(words)}")
        if not found.diverged and advice.least * SAFETY > found.rates[-1] * 5:
            print(f"            the loss was still low at {end}: a larger lr_max may show more")
    numbers: dict[str, Any] = {
        "choices": run.config.choices,
        "seed": run.config.seed,
        "global_batch": found.global_batch,
        "rates": found.rates,
        "losses": found.losses,
        "smoothed": found.smoothed().tolist(),
        "ended": found.ended,
        "diverged": found.diverged,
        "suggestion": None if advice is None else vars(advice),
        "overrides": pasted,
    }
    make_folder(folder)
    write_atomic(folder / "lr_finder.json", json.dumps(numbers, indent=1) + "\n")
    if found.rates:
        marks = {} if advice is None else {"steepest": advice.steepest, "tenth of the least": advice.tenth}
        path = folder / "lr_finder.png"
        plots.lr_range(found.rates, found.losses, found.smoothed(), path, marks=marks)
        print(f"curve       {path}")


def _span(given: dict[str, str]) -> tuple[float, float, int]:
    """lr_min, lr_max and steps, each as given or as usual. Raises UserError."""
    low, high = (_number(key, given.get(key), usual) for key, usual in (("lr_min", LR_MIN), ("lr_max", LR_MAX)))
    if low >= high:
        raise UserError(f"lr_min={low:g} lr_max={high:g}: expected a smaller lr_min than lr_max")
    text = given.get("steps", str(STEPS))
    if not text.isdecimal() or int(text) < FEWEST_STEPS:
        raise UserError(f"steps={text}: expected a whole number of at least {FEWEST_STEPS}")
    return low, high, int(text)


def _number(key: str, text: str | None, usual: float) -> float:
    try:
        number = usual if text is None else float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{key}={text}: expected a number above 0, such as {usual:g}")
    return number


def _folder(output: str | None, name: str) -> Path:
    folder = Path("outputs") / "lr_finder" / name if output is None else Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={output}: is a file; a folder for lr_finder.png and lr_finder.json is needed")
    return folder
