"""What a person types, in processes of its own: the README's commands, a sweep, stages after each other, mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitexp.errors import UserError

TINY = [
    "model=vit_debug",
    "data=fake",
    "data.num_train=32",
    "data.num_val=8",
    "train.batch_size=8",
    "train.max_steps=3",
]


def vitexp(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vitexp", *arguments], capture_output=True, text=True, check=False)


def test_pretrain_finetune_and_evaluate(workdir: Path) -> None:
    done = vitexp(*TINY, "output_dir=first", "model.representation_dim=16", "train.log_every=1")
    assert done.returncode == 0, done.stderr
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout
    assert "run folder" in done.stdout
    left = {path.name for path in Path("first").iterdir()}
    assert left >= {
        "config.yaml", "metrics.jsonl", "summary.json", "train.log", "checkpoints", "plots", "model.safetensors",
        "model.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in Path("first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert {"train/loss", "train/lr", "perf/images_per_s"} <= rows[0].keys()
    summary = json.loads(Path("first/summary.json").read_text())
    last = {k: v for row in rows for k, v in row.items() if "/" in k and not k.startswith("perf/")}
    assert {k: summary[k] for k in last} == last, "the summary's keys are the metrics' names"
    assert summary["parameters"] > 0
    assert summary["versions"]["torch"]

    tuned = vitexp(*TINY, "stage=finetune", "init_from=first", "model.image_size=48", "output_dir=second")
    assert tuned.returncode == 0, tuned.stderr
    assert "head fresh" in tuned.stderr
    assert "(4, 4) -> (6, 6)" in tuned.stderr or "4x4 -> 6x6" in tuned.stderr, tuned.stderr

    measured = vitexp("evaluate", "run=second")
    assert measured.returncode == 0, measured.stderr
    found = json.loads(Path("second/evaluation.json").read_text())
    assert found["val/top1"] == json.loads(Path("second/summary.json").read_text())["val/top1"]

    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///" + str(Path("outputs/mlflow.db").resolve()))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.run_name for run in runs} == {"first", "second"}
    by_name = {run.info.run_name: run for run in runs}
    assert by_name["first"].info.status == "FINISHED"
    assert by_name["first"].data.metrics["val/top1"] == pytest.approx(summary["val/top1"])
    assert by_name["second"].data.tags["stage"] == "finetune"
    assert by_name["first"].data.params["choices.model"] == "vit_debug"
    names = {item.path for item in client.list_artifacts(by_name["first"].info.run_id)}
    assert {"config.yaml", "summary.json", "plots"} <= names
    first = by_name["first"].info
    (model,) = client.search_logged_models([first.experiment_id], f"source_run_id = '{first.run_id}'")
    assert "model_best.safetensors" in {item.path for item in client.list_logged_model_artifacts(model.model_id)}


def test_the_same_command_again_trains_nothing_twice(workdir: Path) -> None:
    first = vitexp(*TINY, "output_dir=run", "tracking=none")
    before = Path("run/metrics.jsonl").read_bytes()
    again = vitexp(*TINY, "output_dir=run", "tracking=none")
    assert first.returncode == again.returncode == 0
    assert "already finished" in again.stderr
    assert Path("run/metrics.jsonl").read_bytes() == before


def test_a_sweep_gives_every_job_a_process_and_a_folder_and_survives_a_bad_one(workdir: Path) -> None:
    done = vitexp("--multirun", *TINY, "optim=adam", "optim.lr=1e-3,1e30", "schedule=constant", "output_dir=sweep")
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed") and line.endswith(".log)")]
    assert failed, done.stderr
    assert all("lr=1e+30: train/loss is" in line for line in failed), failed
    finished = sorted(path.parent.name for path in Path("sweep").glob("*/summary.json"))
    assert len(finished) + len(failed) == 2
    assert [name.startswith("lr-0.001-") for name in finished] == [True]
    assert "best        lr=0.001: val/top1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["model.depht=3"], ["model.depht", "'model.depth'"]),
        (["--multirun", "optim=adam,sdg"], ["sdg", "'sgd'"]),
        (["data=folder", "data.root=nowhere"], ["data.root=nowhere", "no such file or folder"]),
        (["evaluate", "run=nowhere"], ["run=nowhere", "no such run"]),
        (["evaluate"], ["run=<run folder>"]),
        (["sync"], ["run=<run folder>"]),
        (["--config-dir", "nowhere"], ["--config-dir nowhere", "no such folder"]),
        (["--config-dir=", "model=vit_tiny"], ["--config-dir=", "needs a value"]),
        (["completion", "bash", "zsh"], ["completion bash zsh", "one shell"]),
        (["evaluate", "run=here", "init_from=there"], ["init_from=there", "run=here has weights of its own"]),
        (["model.image_size=1000000", "tracking=none"], ["does not fit into memory", "model.image_size"]),
        (["--frobnicate"], ["--frobnicate", "--help"]),
        (["runtime.device=cuda"], ["runtime.device=cuda", "cpu"]),
        (["runtime.precision=fp16"], ["runtime.precision=fp16", "bf16"]),
        (["tracking.uri=./mlruns"], ["tracking.uri=./mlruns", "sqlite:///"]),
    ],
)
def test_a_mistake_is_one_clear_answer(workdir: Path, arguments: list[str], words: list[str]) -> None:
    done = vitexp(*arguments)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    for word in words:
        assert word in "\n".join(said), done.stderr
    # A run that gets as far as its data has said what it found first.
    assert len([line for line in said if line.startswith("vitexp: ")]) == 1, done.stderr
    assert len(said[said.index(next(line for line in said if line.startswith("vitexp: "))) :]) <= 3


def test_a_closed_pipe_and_a_bare_environment_do_not_stop_a_run(workdir: Path) -> None:
    command = " ".join([sys.executable, "-m", "vitexp", *TINY, "output_dir=piped", "tracking=none"])
    done = subprocess.run(["bash", "-c", f"env -i LANG=C {command} 2>&1 | head -1"], check=False, capture_output=True)
    assert done.returncode == 0
    assert json.loads(Path("piped/summary.json").read_text())["step"] == 3


def test_a_reader_that_has_left_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "vitexp", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(), said) == (128 + signal.SIGPIPE, "")


def test_a_finished_run_keeps_its_model(tmp_path):
    from vitexp.config import RAW_NAME, compose_and_check, reload, to_yaml

    raw = compose_and_check(["data=fake", "tracking=none"]).raw
    (tmp_path / RAW_NAME).write_text(to_yaml({**raw, "choices": {}}))
    assert reload(tmp_path, ["train.batch_size=7"]).train.batch_size == 7
    with pytest.raises(UserError, match="model=vit_huge: a run keeps its model"):
        reload(tmp_path, ["model=vit_huge"])
    folder = reload(tmp_path, ["data=folder", f"data.root={tmp_path}"])  # whose settings are other ones
    assert folder.choices["data"] == "folder"
    assert reload(tmp_path, ["data=digits", "runtime=default"]).choices["data"] == "digits"
    assert reload(tmp_path, ["augment=none", "evaluators=knn"]).choices["augment"] == "none"
