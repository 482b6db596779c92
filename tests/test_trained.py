from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitexp
from vitexp.data.batch_transforms import normalise
from vitexp.data.images import decode
from vitexp.data.transforms import ResizeCenterCrop, apply
from vitexp.errors import BadImage, UserError
from vitexp.export import export_model
from vitexp.models.vit import VisionTransformer

ARCHITECTURE = {
    "_target_": "vitexp.models.vit.VisionTransformer",
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 7,
}
CLASSES = ["airplane", "bird", "cat", "deer", "dog", "金鱼", "ship"]
PREPROCESSING = {
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "crop_fraction": 0.875,
    "interpolation": "bicubic",
    "channels": 3,
}


def make_model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{key: value for key, value in ARCHITECTURE.items() if key != "_target_"})
    torch.nn.init.normal_(model.head.weight, std=0.5)  # a new head is zero: every class equally likely
    return model.eval()


def export(folder: Path, model: torch.nn.Module, **changes) -> Path:
    given = {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "metrics": {"val/top1": 0.75, "val/loss": float("nan")},
        "stage": "pretrain",
    }
    return export_model(folder, model.state_dict(), **(given | changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    export(folder, make_model())
    (folder / "config.yaml").write_text("seed: 3\noptim: {lr: 0.001}\n")
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for number, size in enumerate([(40, 60), (32, 32), (100, 45), (33, 33), (20, 20)]):
        rough = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.png")
        rough.resize(size).save(paths[-1])
    return paths


def edit(folder: Path, change) -> None:
    path = folder / "model.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def test_a_loaded_run_predicts_what_the_model_itself_says(exported, photos):
    run = vitexp.load_run(exported)
    model, evaluation = make_model(), ResizeCenterCrop(image_size=32, crop_fraction=0.875)
    images = apply(evaluation, [decode(p, str(p)) for p in photos], np.empty((len(photos), 0)))
    images = normalise(torch.from_numpy(images), PREPROCESSING["mean"], PREPROCESSING["std"])
    with torch.no_grad():
        shares = model(images).softmax(dim=1)
    found = run.predict(photos, batch_size=2)
    assert len(found) == len(photos)
    for prediction, row in zip(found, shares, strict=True):
        assert prediction.class_name == CLASSES[row.argmax()] == prediction.top[0][0]
        assert prediction.probability == prediction.top[0][1] == pytest.approx(row.max().item(), abs=1e-6)
        assert len(prediction.top) == 5
        for name, share in prediction.top:
            assert share == pytest.approx(row[CLASSES.index(name)].item(), abs=1e-6)
    assert len({p.class_name for p in found}) > 1  # the pictures matter
    torch.testing.assert_close(run.transform(photos[0]), images[0], rtol=0, atol=0)


def test_what_a_run_knows_comes_back(exported):
    run = vitexp.load_run(exported)
    assert run.classes == CLASSES
    assert run.config == {"seed": 3, "optim": {"lr": 0.001}}
    assert run.metrics == {"val/top1": 0.75, "val/loss": None}
    assert run.stage == "pretrain"
    assert not any(module.training for module in run.model.modules())
    for key, value in make_model().state_dict().items():
        assert torch.equal(run.model.state_dict()[key], value)


def test_a_picture_is_the_same_in_every_form(exported, photos):
    run = vitexp.load_run(exported)
    image = Image.open(photos[0])
    array = np.asarray(image)
    want = run.predict(photos[0])
    assert len(want) == 1
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (str(photos[0]), image, image.convert("RGBA"), array, tensor, [photos[0]], array[None], iter([image])):
        assert run.predict(form) == want
    gray = image.convert("L")
    same = [run.transform(form) for form in (gray, np.asarray(gray), np.asarray(gray)[..., None], gray.convert("RGB"))]
    assert all(torch.equal(other, same[0]) for other in same)
    assert run.transform(image.convert("CMYK")).shape == run.transform(image.convert("P")).shape == (3, 32, 32)
    assert run.predict([]) == []


def test_a_turned_photograph_is_turned_back(exported, photos, tmp_path):
    run, image = vitexp.load_run(exported), Image.open(photos[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    want = run.transform(image)
    assert torch.equal(run.transform(tmp_path / "turned.png"), want)
    assert torch.equal(run.transform(Image.open(tmp_path / "turned.png")), want)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32 array"),
        (torch.zeros(3, 8, 8), "float32 array"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \[8, 8, 5\]"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        ([7], "picture 0 is a int"),
        ("nowhere.jpg", "nowhere.jpg: cannot be opened"),
        (Image.new("F", (4, 4), 300.0), "picture 0: float pixels"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(exported, bad, words):
    with pytest.raises(UserError, match=words):
        vitexp.load_run(exported).predict(bad)


def test_a_damaged_file_among_good_ones_is_named(exported, photos, tmp_path):
    (tmp_path / "cut.png").write_bytes(photos[0].read_bytes()[:60])
    with pytest.raises(BadImage, match=r"cut\.png"):
        vitexp.load_run(exported).predict([photos[0], tmp_path / "cut.png"])


def test_gray_models_get_gray_pictures(tmp_path, photos):
    architecture = ARCHITECTURE | {"in_channels": 1}
    model = VisionTransformer(**{key: value for key, value in architecture.items() if key != "_target_"})
    preprocessing = PREPROCESSING | {"channels": 1, "mean": [0.5], "std": [0.5]}
    export(tmp_path, model, architecture=architecture, preprocessing=preprocessing)
    run = vitexp.load_run(tmp_path)
    assert run.transform(photos[0]).shape == (1, 32, 32)
    assert torch.equal(run.transform(photos[0]), run.transform(np.asarray(Image.open(photos[0]))))


def test_a_timm_model_comes_back_without_a_download(tmp_path, photos, monkeypatch):
    from vitexp.models.timm_backbone import TimmBackbone

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    architecture = {"_target_": "vitexp.models.timm_backbone.TimmBackbone", "name": "test_resnet", "num_classes": 7}
    model = TimmBackbone("test_resnet", num_classes=7).eval()
    export(tmp_path, model, architecture=architecture | {"pretrained": True})
    run = vitexp.load_run(tmp_path)
    images = torch.stack([run.transform(p) for p in photos])
    with torch.no_grad():
        assert torch.equal(run.model(images), model(images))


def test_other_weights_have_their_own_description(folder):
    better = make_model()
    torch.nn.init.zeros_(better.head.weight)
    export(folder, better, filename="model_best.safetensors", metrics={"val/top1": 0.9})
    assert vitexp.load_run(folder, weights="model_best.safetensors").metrics == {"val/top1": 0.9}
    assert vitexp.load_run(folder).metrics["val/top1"] == 0.75
    assert not vitexp.load_run(folder, weights="model_best.safetensors").model.head.weight.any()


def test_tied_and_strided_weights_are_exported_whole(tmp_path):
    model = make_model()
    state = model.state_dict()
    state["blocks.1.norm1.weight"] = state["blocks.0.norm1.weight"]
    state["head.weight"] = torch.nn.Parameter(torch.randn(40, 14)[:32, ::2].T)
    given = {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "metrics": {},
        "stage": "x",
    }
    export_model(tmp_path, state, **given)
    assert torch.equal(vitexp.load_run(tmp_path).model.head.weight, state["head.weight"])


def test_the_files_appear_whole_and_others_can_read_the_weights(exported):
    from safetensors import safe_open

    assert sorted(p.name for p in exported.iterdir()) == ["config.yaml", "model.json", "model.safetensors"]
    described = json.loads((exported / "model.json").read_text(encoding="utf-8"))
    assert described["weights"]["bytes"] == (exported / "model.safetensors").stat().st_size
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_missing_files_are_named_with_what_is_there(folder, tmp_path):
    with pytest.raises(UserError, match="nothing is not there"):
        vitexp.load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="a file, not a run folder"):
        vitexp.load_run(folder / "model.json")
    with pytest.raises(UserError, match=r"model_best\.safetensors is not there; there is model\.safetensors"):
        vitexp.load_run(folder, weights="model_best.safetensors")
    (folder / "model.json").unlink()
    with pytest.raises(UserError, match=r"model\.json is not there"):
        vitexp.load_run(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="a run writes it when it ends"):
        vitexp.load_run(folder)
    export(folder, make_model())
    with pytest.raises(UserError, match="device=nonsense"):
        vitexp.load_run(folder, device="nonsense")


def test_one_flipped_bit_is_found(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="checksums differ"):
        vitexp.load_run(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\x00", "[" * 100_000])
def test_a_broken_description_is_one_line(folder, content):
    (folder / "model.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.json") as refused:
        vitexp.load_run(folder)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "target",
    [
        None,
        7,
        "os.system",
        "torch.load",
        "vitexp.models",
        "vitexp.models.nothing.Model",
        "vitexp.models.vit.Nothing",
        "vitexp.models.vit.torch",
        "vitexp.models.vit.checkpoint",
        "vitexp.models.vit.LayerScale",
        "vitexp.models.vit._init_jax",
        "vitexp.models.vit.UserError",
        "vitexp.models.weights.load_weights",
        "vitexp.models..vit.VisionTransformer",
        "vitexp.models.vit.VisionTransformer.train",
    ],
)
def test_only_models_of_this_package_are_built(folder, target):
    edit(folder, lambda described: described["architecture"].update(_target_=target))
    with pytest.raises(UserError, match=r"model\.json: .* is not a model of vitexp\.models"):
        vitexp.load_run(folder)


def test_an_architecture_that_does_not_fit_is_explained(folder):
    edit(folder, lambda described: described["architecture"].update(depht=3))
    with pytest.raises(UserError, match=r"model\.json: architecture: .*depht"):
        vitexp.load_run(folder)
    edit(folder, lambda described: (described["architecture"].pop("depht"), described["architecture"].update(depth=3)))
    with pytest.raises(UserError, match=r"lacks blocks\.2\.norm1\.weight"):
        vitexp.load_run(folder)
    edit(folder, lambda described: described["architecture"].update(depth=2, num_classes=9))
    with pytest.raises(UserError, match=r"head\.weight is \[7, 32\], in the model \[9, 32\]"):
        vitexp.load_run(folder)


def test_preprocessing_must_be_complete(folder):
    edit(folder, lambda described: described["preprocessing"].update(sharpen=2))
    with pytest.raises(UserError, match=r"preprocessing: .*sharpen"):
        vitexp.load_run(folder)
    edit(folder, lambda described: described["preprocessing"].pop("mean"))
    with pytest.raises(UserError, match="preprocessing lacks mean"):
        vitexp.load_run(folder)


def test_a_run_without_classes_predicts_nothing(tmp_path, photos):
    export(tmp_path, make_model(), classes=[], stage="mae")
    with pytest.raises(UserError, match="no classes to predict: its stage was mae"):
        vitexp.load_run(tmp_path).predict(photos)


def test_a_full_disk_keeps_the_export_before(folder):
    import resource

    before = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*model\.safetensors"):
            export(folder, make_model())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 3
    vitexp.load_run(folder)
