from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitexp.checks import signature_of
from vitexp.commands.completion import BASH, FISH, ZSH, candidates, chosen, commented_choices, read_settings
from vitexp.config import compose_unjudged
from vitexp.config_paths import config_groups


def pressed(folder: Path, line: str) -> list[str]:
    """What bash offers at the end of the line, words cut at = and : as bash cuts them."""
    words = re.findall(r"[^\s=:]+|[=:]+", line) + ([""] if line.endswith(" ") else [])
    here = {"vitexp": f"{shlex.quote(sys.executable)} -m vitexp"}
    (folder / "vitexp").write_text(f'#!/bin/sh\nexec {here["vitexp"]} "$@"\n')
    (folder / "vitexp").chmod(0o755)
    script = f"""
{BASH.replace("PYTHONS", "python")}
COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
_vitexp_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
complete -p vitexp python"""
    path = f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": path})
    *found, first, second = done.stdout.splitlines()
    assert "_vitexp_complete vitexp" in first
    assert "_vitexp_complete python" in second
    return [word for word in found if word]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vitexp lr_f", ["lr_finder"]),
        ("vitexp model=vit_hu", ["vit_huge", "vit_huge_timm032"]),
        (f"{sys.executable} -m vitexp plan optim=adamw optim.bet", ["optim.betas="]),
        ("vitexp --multirun optim=adam,sg", ["adam,sgd"]),
        (f"{sys.executable} -m pytest mod", []),
    ],
)
def test_bash_offers_what_may_follow(tmp_path: Path, line: str, offered: list[str]):
    assert pressed(tmp_path, line) == offered


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vitexp --ver", ["--version"]),
        ("vitexp --cfg ", ["all", "hydra", "job"]),
        ("vitexp runtime.precision=", [f"runtime.precision={w}" for w in ("auto", "bf16", "fp16", "fp32")]),
        ("vitexp train.log_weights=", ["train.log_weights=false", "train.log_weights=true"]),
        ("vitexp augment=deit augment.mix_mode=", [f"augment.mix_mode={w}" for w in ("batch", "elem", "pair")]),
        ("vitexp experiment=mae_pretrain method.mask", ["method.mask_ratio=", "method.masking="]),
        ("vitexp method.mask", []),
        ("vitexp +model.dep", ["+model.depth="]),
        ("vitexp export format=o", ["format=onnx"]),
        ("vitexp label split=", ["split=all", "split=train", "split=val"]),
        ("vitexp plan pro", ["probe="]),
        ("vitexp sync optim", []),
        ("vitexp list exp", ["experiments"]),
        ("vitexp list models vit_hu", ["vit_huge", "vit_huge_timm032"]),
        ("vitexp completion f", ["fish"]),
        ("vitexp data=folder data.root=", []),  # the shell's own names of files
        ("python -m pytest ", []),
    ],
)
def test_words_are_commands_options_keys_and_choices(line: str, offered: list[str]):
    assert candidates(line) == offered


def test_a_persons_own_groups_are_offered(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [vit, _self_]\nextra: true\n")
    given = f"vitexp --config-dir {tmp_path} model=mi"
    assert candidates(given) == ["model=mine"]
    assert candidates(f"{given}ne model.extra=") == ["model.extra=false", "model.extra=true"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "model=timm optim=muon",
        "experiment=mae_pretrain",
        "experiment=lvvit_small augment=none",
        "debug=overfit",
        "sweep=halving",
    ],
)
def test_keys_are_those_that_hydra_composes(line: str):
    def keys(node: dict, prefix: str = "") -> set[str]:
        deeper = (keys(value, f"{prefix}{key}.") for key, value in node.items() if isinstance(value, dict))
        return {f"{prefix}{key}" for key in node}.union(*deeper)

    _, composed = compose_unjudged(line.split())
    assert keys(read_settings(chosen(line.split(), None), None).tree) == keys(composed)


def test_choices_in_comments_are_those_of_the_components_signatures():
    seen = 0
    for group, option in [(g, o) for g in ("model", "method") for o in config_groups()[g]]:
        settings = read_settings(chosen([f"{group}={option}"], None), None)
        _, annotations, _ = signature_of(settings.tree[group]["_target_"], group)
        for name, annotation in annotations.items():
            allowed = re.findall(r"'([^']+)'", ast.unparse(annotation)) if "Literal" in ast.unparse(annotation) else []
            if allowed and settings.choices_of(f"{group}.{name}"):
                seen += 1
                assert set(settings.choices_of(f"{group}.{name}")) == set(allowed), (group, option, name)
    assert seen > 50


def test_a_choice_is_a_word_before_the_first_mark():
    assert commented_choices("of the head: zero | mae_finetune (2e-5) | timm: as there") == [
        "zero",
        "mae_finetune",
        "timm",
    ]
    assert commented_choices("before_pool: every token (JAX) | after_pool: one") == ["before_pool", "after_pool"]
    assert commented_choices("pixels, one number or [height, width]") == []


def test_a_tab_costs_no_heavy_import_and_little_time():
    code = """
import sys, time
from vitexp.commands.completion import candidates
assert candidates("vitexp experiment=mae_pretrain model.")
heavy = {"torch", "hydra", "omegaconf", "numpy", "timm", "mlflow"} & sys.modules.keys()
print(*heavy, time.process_time() < 0.5)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize(("shell", "script"), [("bash", BASH), ("zsh", ZSH), ("fish", FISH)])
def test_scripts_are_whole(shell: str, script: str, tmp_path: Path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script.replace("PYTHONS", "python"))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
