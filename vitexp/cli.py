"""The command line: python -m vitexp [command] [overrides]; train when no command is named.

Nothing heavy is imported here, not even Hydra for --help; torch, timm and MLflow come in when there is work.
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from vitexp import __version__
from vitexp.errors import UserError, nearest

if TYPE_CHECKING:
    from vitexp.config import RunConfig

COMMANDS = {
    "train": "train, evaluate, save and track one run (when no command is named)",
    "evaluate": "measure a finished run (run=<folder>) or weights (init_from=<file> model=…) on its validation split",
    "plan": "GFLOPs, memory, disk, rates, time of a run (overrides, run=<folder>), a sweep or a pipeline, untrained",
    "lr_finder": "learning rates at which a run would learn, from one sweep through them (overrides, lr_min=, lr_max=)",
    "doctor": "what is wrong with a data set (data=…): unreadable, double and odd pictures, classes; settings to paste",
    "predict": "class of every picture (run=<folder> input=<folder or glob> output=<csv, parquet or jsonl>)",
    "label": "a teacher's label maps of every picture (teacher=<run, timm:<name> or weights> data=… output=<store>)",
    "compare": "finished runs side by side on the same pictures (compare <run> <run> …), with intervals and tests",
    "report": "makes a report again: of a sweep's or pipeline's folder, or of all runs of an MLflow experiment",
    "export": "the model for other tools (run=<folder> format=safetensors, timm, torch_export, onnx or hf)",
    "list": "what a group can be set to, a line each (list [models, experiments, optim, …, timm] [filter] params=true)",
    "completion": "lets a shell complete all this: eval `vitexp completion bash`, or zsh, fish",
    "ui": "MLflow's pages of all runs here, in a browser (port=5000 open=true), until Ctrl-C",
    "sync": "send the metrics of a run (run=<folder>) that its tracking server has missed",
}
EXAMPLES = (
    ("python -m vitexp", "a small ViT on scikit-learn's digits, a few minutes on a laptop"),
    ("python -m vitexp model=vit_huge optim=adam schedule=linear_warmup", "any model, optimizer and schedule"),
    ("python -m vitexp --multirun optim=adam,sgd seed=0,1,2", "a sweep, compared in the MLflow UI"),
    ("python -m vitexp pipeline=mae", "pretrain without labels, k-NN, linear probe, finetune, from scratch, report"),
    ("python -m vitexp data=folder data.root=pictures model=vit_tiny", "your own pictures, one folder a class"),
    ("python -m vitexp predict run=outputs/… input=photos output=photos.csv", "a row a picture, by a finished run"),
    ("python -m vitexp export run=outputs/… format=onnx", "the trained model for other tools, with a model card"),
    ("python -m vitexp label teacher=outputs/… output=maps", "what a run sees at each place of its pictures"),
    ("python -m vitexp plan model=vit_base train.batch_size=256", "what a run would cost"),
)
MULTIRUN = ("--multirun", "-m")
HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--hydra-help", *MULTIRUN)


def main(argv: list[str] | None = None) -> None:
    from vitexp.launch import exit_code_of

    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(exit_code_of(lambda: _run(arguments)))


def _run(arguments: list[str]) -> int:
    if any(flag in arguments for flag in ("--help", "-h")):
        print(help_text(_take_option(list(arguments), "--config-dir", "-cd")))
        return 0
    if "--version" in arguments:
        print(f"vitexp {__version__}")
        return 0
    command = "train"
    if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "+", "~")):
        command = arguments.pop(0)
        if command not in COMMANDS:
            raise UserError(
                f"{command!r}: no such command.{nearest(command, COMMANDS)}\ncommands: {', '.join(COMMANDS)}"
            )
    if command == "train" and (sweep := _sweep(arguments)) is not None:
        overrides, config_dir = sweep
        return importlib.import_module("vitexp.sweep").main(overrides, config_dir)
    if command == "train" and any(argument in HYDRA_FLAGS for argument in arguments):
        return _hydra(arguments)
    config_dir = _take_option(arguments, "--config-dir", "-cd")
    if command == "plan":
        arguments = [argument for argument in arguments if argument not in MULTIRUN]
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(f"{argument}: no such option; settings are given as key=value, see python -m vitexp --help")
    if command == "train":
        return _train(arguments, config_dir)
    # A sweep's and a pipeline's are planned too, which the commands know nothing of.
    module = "vitexp.plan_many" if command == "plan" else f"vitexp.commands.{command}"
    command_main = importlib.import_module(module).main
    return command_main(arguments, config_dir)


def _train(overrides: list[str], config_dir: str | None) -> int:
    from vitexp.config import pipeline_settings, request_of
    from vitexp.launch import ranks_given, run_in_processes

    if pipeline_settings(overrides, config_dir) is not None:
        return importlib.import_module("vitexp.pipeline").main(overrides, config_dir)
    config = _checked(overrides, config_dir)
    if ranks_given():
        if not any(text.startswith("output_dir=") for text in overrides):
            raise UserError("output_dir: give it when another launcher starts the ranks, so that all of them share one")
    elif config.runtime.processes > 1:
        return run_in_processes(request_of(config), processes=config.runtime.processes)
    from vitexp.train import train

    train(config)
    return 0


def _hydra(arguments: list[str]) -> int:
    """Sweeps and Hydra's own questions (--cfg, --info, completion) run as the Hydra application they are."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from vitexp.config import check, covering, register_resolvers, request_of, sweep_axes
    from vitexp.config_paths import conf_dir
    from vitexp.launch import complain, run_in_processes
    from vitexp.sweeps.display import of_summary

    rest = list(arguments)
    config_dir = _take_option(rest, "--config-dir", "-cd")
    swept: list[str] = []
    if any(text in MULTIRUN for text in rest):
        own = [text for text in rest if not text.lstrip("+~").startswith(("-", "hydra/", "hydra."))]
        axes = sweep_axes(own, config_dir, ends=True)
        swept = [values[0].partition("=")[0] for values in axes if len(values) > 1]
        for overrides in covering(axes):  # enough to find each typo
            _checked(overrides, config_dir)
    register_resolvers(swept)
    failed: list[tuple[str, int]] = []
    sweep_process = os.getpid()

    def job(config: DictConfig) -> float | None:
        place = HydraConfig.get()
        config.output_dir = place.runtime.output_dir
        overrides = ", ".join(place.overrides.task)
        print(f"\n== job {place.job.num}: {overrides}", file=sys.stderr, flush=True)
        settings = check(config, choices={str(k): str(v) for k, v in place.runtime.choices.items()}, defaults={})
        code = run_in_processes(request_of(settings), processes=settings.runtime.processes)
        if code in (130, 143):
            raise SystemExit(code)
        if code:
            failed.append((overrides, code))
            if os.getpid() != sweep_process:  # a parallel launcher learns of a failure only by an exception
                raise RuntimeError(f"the run ended with exit code {code}")
            return None
        found = of_summary(Path(config.output_dir), metric=None)  # for sweepers, which choose by it
        return None if found is None else found[1]

    # Options first: the parser of arguments takes no settings on both sides of one.
    settings = [text for text in rest if text.startswith("~") or ("=" in text and not text.startswith("-"))]
    options = [text for text in rest if text not in settings]
    sys.argv = ["vitexp", *(["--config-dir", config_dir] if config_dir else []), *options, *settings]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    for overrides, code in failed:
        complain(f"failed with exit code {code}: {overrides}")
    return 1 if failed else 0


def _sweep(arguments: list[str]) -> tuple[list[str], str | None] | None:
    """(overrides, folder of own groups) of a sweep that is run here; None where it is none, or one of Hydra's own
    launchers and sweepers shall run it."""
    rest = list(arguments)
    config_dir = _take_option(rest, "--config-dir", "-cd")
    overrides = [text for text in rest if text not in MULTIRUN]
    if len(overrides) == len(rest) or any(text.startswith(("-", "hydra")) for text in overrides):
        return None
    return overrides, config_dir


def _checked(overrides: list[str], config_dir: str | None) -> RunConfig:
    from vitexp.config import compose_and_check
    from vitexp.tracking import resolve_uri

    config = compose_and_check(overrides, config_dir)
    resolve_uri(config.tracking.get("uri"), Path("outputs"))
    return config


def _take_option(arguments: list[str], *names: str) -> str | None:
    """Removes `--name value` or `--name=value` from the arguments and returns the value."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            if not equals:
                if position + 1 >= len(arguments):
                    raise UserError(f"{name}: needs a value")
                value = arguments.pop(position + 1)
            arguments.pop(position)
            if not value:
                raise UserError(f"{name}=: needs a value")
            return value
    return None


def help_text(config_dir: str | None) -> str:
    from vitexp.config_paths import config_groups

    lines = ["vitexp: Vision Transformer experiments", "", "  python -m vitexp [command] [key=value …]", "", "commands"]
    lines += [f"  {name:<12}{words}" for name, words in COMMANDS.items()]
    lines += ["", "groups and their options (group=option)"]
    for group, options in config_groups(config_dir).items():
        lines += textwrap.wrap(" ".join(options), 108, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)
    lines += ["", "settings of a group: key=value, such as train.epochs=20 optim.lr=3e-4 model.drop_path=0.1"]
    lines += ["all of them: python -m vitexp --cfg job    your own groups: --config-dir <folder>", "", "examples"]
    for line, words in EXAMPLES:
        lines += [f"  {line}", f"      {words}"]
    return "\n".join(lines)
