"""Bad settings are named before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from vitexp import checks
from vitexp.config import compose_and_check
from vitexp.errors import UserError

BAD = {
    "model.depht=3": ("model.depht", "model.depth"),
    "optim=adamw2": ("optim=adamw2", "adamw"),
    "modle=vit_tiny": ("modle", "model"),
    "experimnt=x": ("experimnt", "experiment"),
    "model.depth=abc": ("model.depth=abc", "a whole number"),
    "model.depth=2.5": ("model.depth=2.5", "a whole number"),
    "model.qkv_bias=3": ("model.qkv_bias=3", "true or false"),
    "model.pool=median": ("model.pool=median", "cls"),
    "optim.lr=-1": ("optim.lr=-1", "above 0"),
    "optim.lr=0": ("optim.lr=0", "above 0"),
    "optim.lr=nan": ("optim.lr=nan", "finite"),
    "optim.lr=inf": ("optim.lr=inf", "finite"),
    "optim.lr=abc": ("optim.lr=abc", "a number"),
    "optim.weight_decay=-0.1": ("optim.weight_decay=-0.1", "at least 0"),
    "train.batch_size=0": ("train.batch_size=0", "at least 1"),
    "train.batch_size=1.5": ("train.batch_size=1.5", "a whole number"),
    "train.epochs=-1": ("train.epochs=-1", "above 0"),
    "train.workers=-1": ("train.workers=-1", "at least 0"),
    "train.clip_norm=-2": ("train.clip_norm=-2", "above 0"),
    "schedule.warmup_epochs=-1": ("schedule.warmup_epochs=-1", "at least 0"),
    "seed=null": ("seed=null", "a whole number"),
    "seed=x": ("seed=x", "a whole number"),
    "model.patch_size=5": ("model.patch_size=5", "4, 8"),
    "model.num_heads=5": ("model.num_heads=5", "model.embed_dim"),
    "runtime.precision=bf17": ("runtime.precision=bf17", "bf16"),
    "stage.position_mode=bilinear": ("stage.position_mode=bilinear", "jax"),
    "resume=maybe": ("resume=maybe", "auto, must, never"),
    "augment=deit augment.mixup={a:1}": ("mixup_alpha={'a': 1}", "a number"),
    "augment.batch=mixup": ("augment.batch=mixup", "null"),
    "method.loss=null": ("method.loss=null", "one of cross_entropy"),
    "model.image_size=[]": ("model.image_size=[]", "[height, width]"),
    "optim.betas=[0.9]": ("optim.betas=[0.9]", "2 numbers"),
    "optim.betas=[0.9,1.5]": ("optim.betas=[0.9, 1.5]", "below 1"),
    "model.image_size=[32,30]": ("model.patch_size=4", "does not divide model.image_size=[32, 30]"),
    "model.image_size=[32,x]": ("model.image_size=[32, 'x']", "a whole number or a list of"),
    "init_from=7": ("init_from=7", "expected text or null"),
    "output_dir=true": ("output_dir=true", "expected text"),
    "train.classes=cat": ("train.classes=cat", "a list of text or a whole number or null"),
    "train.ema_warmup=soon": ("train.ema_warmup=soon", "true or false"),
    "init_from=/no/such/file": ("init_from=/no/such/file", "no such file"),
    "data=folder": ("data.root", "no value"),
    "data=folder data.root=/no/such/folder": ("data.root=/no/such/folder", "no such file or folder"),
    "stage=finetune": ("stage=finetune", "init_from"),
    "optim.optimizer.lrr=1": ("lrr", "lr"),
    "+optim.optimizer.lrr=1": ("lrr", "takes no argument"),
    "+model.depht=3": ("model.depht", "'depth'"),
    "+schedule.warmup_epoch=3": ("schedule.warmup_epoch", "'warmup_epochs'"),
    "modle.depth=3": ("modle.depth", "'model.depth'?\ntop level has: allow_changes"),
    "model=timm model.options.drop_rate=1": ("model.options is empty", "+model.options.drop_rate=…"),
    "model=null": ("model=null", "no such option"),
    "+nothing=1": ("nothing", "no such key"),
    "+train.epoch=1": ("train.epoch", "'epochs'"),
    "model._target_=os.system": ("model._target_=os.system", "not allowed"),
    "optim": ("optim", "key=value"),
    "optim.lr=[1": ("optim.lr=[1", "inner quotes"),
    "schedule.warmup_steps=5 schedule.warmup_epochs=1": ("schedule.warmup_epochs=1 schedule.warmup_steps=5", "one"),
    "optim.no_decay=mae_pretran": ("optim.no_decay=mae_pretran", "'mae_pretrain'"),
    "optim.no_decay.tokens=false": ("optim.no_decay.tokens", "'optim.no_decay.token'"),
    "train.epochs=null train.max_steps=null": ("train.epochs=null", "give one"),
    "train.epochs=${train.epochs}": ("train.epochs", ""),
    "train=null": ("train=null", "settings: epochs"),
    "train=5": ("train=5", "settings: epochs"),
    "~train.epochs": ("train.epochs: was taken out", "max_steps"),
    "~data.mean": ("data.mean: was taken out", "std"),
    "~model._target_": ("model._target_: was taken out", "image_size"),
    "data.source=null": ("data.source=null", "_target_"),
    "data.std=null": ("data.std=null", "[0.5, 0.5, 0.5]"),
    "data.mean=[a,b,c]": ("data.mean=['a', 'b', 'c']", "a list of numbers"),
    "data=parquet data.train=[5]": ("data.train=[5]", "a list of text"),
    "data=folder data.root=''": ("data.root=''", "is empty"),
    "init_from=''": ("init_from=''", "is empty"),
    "output_dir=''": ("output_dir=''", "is empty"),
    "augment.train=null": ("augment.train=null", "_target_"),
    "augment.eval=null": ("augment.eval=null", "_target_"),
    "evaluators.classification=null": ("evaluators.classification=null", "~evaluators.classification takes it out"),
    "+evaluators.knn=5": ("evaluators.knn=5", "evaluators=knn"),
    "optim.no_decay=null": ("optim.no_decay=null", "settings: bias"),
    "optim.no_decay=5": ("optim.no_decay=5", "settings: bias"),
    "optim.no_decay.names=null": ("optim.no_decay.names=null", "such as []"),
    "optim.betas=null": ("optim.betas=null", "[0.9, 0.999]"),
    "optim.optimizer=null": ("optim.optimizer=null", "_target_"),
    "schedule._partial_=null": ("schedule._partial_=null", "stays"),
    "+model._partial_=true": ("model._partial_=true", "stays"),
    "runtime.threads=1000000000": ("runtime.threads=1000000000", "this machine has"),
    "runtime.processes=100000": ("runtime.processes=100000", "this machine has"),
    "train.workers=100000": ("train.workers=100000", "this machine has"),
    "+model=vit_tiny": ("+model=vit_tiny", "model=vit_tiny takes its place"),
    "optim=adam,sgd": ("optim=adam,sgd", "--multirun"),
    "seed=0,1": ("seed=0,1", "--multirun"),
}


@pytest.mark.parametrize("overrides", BAD)
def test_a_mistake_is_named_with_what_is_allowed(overrides: str) -> None:
    with pytest.raises(UserError) as error:
        compose_and_check(overrides.split(" "))
    text = str(error.value)
    for word in BAD[overrides]:
        assert word in text, text
    assert len(text.splitlines()) <= 3, text


@pytest.mark.parametrize("overrides", ["~evaluators.classification", "~model.depth", "augment=deit augment.batch=null"])
def test_what_can_do_without_is_taken_out(overrides: str) -> None:
    compose_and_check(overrides.split(" "))


def test_the_sets_without_decay_are_those_of_optim() -> None:
    from vitexp.optim import NO_DECAY

    assert tuple(NO_DECAY) == checks.NO_DECAY_SETS


HOSTILE = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "builtins.open",
    "torch.load",
    "torch.hub.load",
    "torch.utils.collect_env.run",
    "torch.nn.functional.torch.load",
    "torch.nn.modules.module.torch.hub.load",
    "torch.optim.optimizer.functools.reduce",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.nn.init.uniform_",
    "joblib.load",
    "numpy.load",
    "numpy.save",
    "shutil.copy",
    "shutil.rmtree",
    "pathlib.Path.touch",
    "urllib.request.urlretrieve",
    "pickle.loads",
    "timm.models.load_checkpoint",
    "timm.models.load_state_dict_from_hf",
    "timm.create_model",
    "timm.optim.optim_factory.os.system",
    "vitexp.run_folder.write_atomic",
    "vitexp.checkpoint.save",
    "vitexp.launch.run_in_processes",
    "vitexp.models.vit.torch.load",
    "vitexp.models.weights.torch.load",
    "vitexp.data.sources.folder.os.system",
    "vitexp.models.vit.__builtins__",
    "vitexp.models..vit",
    "",
]


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("place", ["model", "optim.optimizer", "evaluators.classification"])
def test_a_target_that_runs_code_or_writes_files_is_refused(place: str, target: str) -> None:
    with pytest.raises(UserError, match=r"not allowed|no module|defines no|has no"):
        compose_and_check([f"{place}._target_='{target}'"])


def test_own_packages_are_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"model": {"_target_": "collections.Counter"}}
    with pytest.raises(UserError, match="VITEXP_ALLOW_TARGETS"):
        checks.check_components(node, node)
    monkeypatch.setenv("VITEXP_ALLOW_TARGETS", "collections.")
    checks.check_components(node, node)


def test_a_tracking_address_that_is_no_store_is_named_before_anything_is_read() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vitexp", "tracking.uri=./mlruns"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "vitexp: tracking.uri=./mlruns" in done.stderr
    assert not any(line.rstrip().endswith((" timm", " mlflow")) for line in done.stderr.splitlines())


def test_a_typo_is_answered_on_the_command_line_in_seconds_without_torch() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vitexp", "model.depth=abc"], capture_output=True, text=True
    )
    assert time.monotonic() - started < 5
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["vitexp: model.depth=abc: expected a whole number of at least 1"]
    assert not any(line.rstrip().endswith((" torch", " timm", " mlflow")) for line in done.stderr.splitlines())


def test_help_needs_neither_torch_nor_hydra() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vitexp", "--help"], capture_output=True, text=True, check=True
    )
    for heavy in ("torch", "hydra", "omegaconf", "mlflow", "numpy"):
        assert not any(line.rstrip().endswith(f" {heavy}") for line in done.stderr.splitlines()), heavy
    for group in ("model", "optim", "schedule", "data", "augment", "stage", "method", "runtime", "tracking", "debug"):
        assert f"\n  {group} " in done.stdout
    assert done.stdout.count("  python -m vitexp") >= 6
