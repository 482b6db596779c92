"""Dense scores against the obvious ones, place by place; what is kept of them; and what official files hold."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from torch import Tensor, nn

from vitexp.data.images import ArrayImages
from vitexp.errors import UserError
from vitexp.labeling import (
    Squash,
    check_dense,
    dense_scores,
    official_maps,
    official_paths,
    read_official_file,
    score,
    top_scores,
)
from vitexp.models.lvvit import LVViT
from vitexp.models.mae import MaskedAutoencoder
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.teachers import Teacher

SMALL_VIT = {"image_size": [32, 48], "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7}
SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


def pictures(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def stirred(model: nn.Module) -> nn.Module:
    """With weights and statistics in which nothing is zero or one, so that leaving something out shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def small_timm(name: str, size: tuple[int, int] = (64, 64), **options) -> TimmBackbone:
    model = TimmBackbone(name, image_size=size, num_classes=7, options=options)
    return stirred(model)  # type: ignore[return-value]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_efficientnet", {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)]
)
def test_a_networks_dense_scores_average_to_its_own_logits(name, options):
    model, images = small_timm(name, **options), pictures(64, 64)
    scores = dense_scores(model, images)
    wanted = model(images)
    assert scores.shape[1] * scores.shape[2] > 1
    assert scores.flatten(1, 2).std(dim=1).max() > 1e-3 * wanted.abs().max()  # not one answer everywhere
    torch.testing.assert_close(scores.mean(dim=(1, 2)), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@torch.inference_mode()
def test_a_vit_that_averages_normed_tokens_averages_its_dense_scores():
    model = stirred(VisionTransformer(**SMALL_VIT, class_token=False, pool="mean"))
    scores = dense_scores(model, pictures(32, 48))
    assert scores.shape == (2, 2, 3, 7)
    torch.testing.assert_close(scores.mean(dim=(1, 2)), model(pictures(32, 48)))


@torch.inference_mode()
def test_a_networks_scores_are_its_classifier_at_each_place_of_an_oblong_picture():
    model, images = small_timm("resnet18", (64, 96)), pictures(64, 96)
    maps, fc = model.timm_model.forward_features(images), model.timm_model.fc
    scores = dense_scores(model, images)
    assert scores.shape == (2, 2, 3, 7)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(scores[:, row, column], maps[:, :, row, column] @ fc.weight.T + fc.bias)


@torch.inference_mode()
def test_a_norm_between_pooling_and_classifier_is_done_at_each_place():
    model, images = small_timm("test_convnext"), pictures(64, 64)
    maps, head = model.timm_model.forward_features(images), model.timm_model.head
    scores = dense_scores(model, images)
    norm = nn.LayerNorm(maps.shape[1], eps=head.norm.eps)
    norm.load_state_dict(head.norm.state_dict())
    torch.testing.assert_close(scores[:, 1, 0], head.fc(norm(maps[:, :, 1, 0])))


@torch.inference_mode()
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pool": "mean", "norm": "after_pool"},
        {"pool": "mean", "class_token": False},
        {"representation_dim": 12},
        {"head_norm": "batch"},
    ],
)
def test_a_vits_scores_are_its_classifier_on_each_patch_token(how):
    model = stirred(VisionTransformer(**SMALL_VIT, **how))
    images = pictures(32, 48)
    patches = model.encode(model.embed(images)).patches
    scores = dense_scores(model, images)
    for place in range(6):
        token = patches[:, place]
        if how.get("norm") == "after_pool":
            token = model.fc_norm(token)
        if "representation_dim" in how:
            token = torch.tanh(token @ model.pre_logits.fc.weight.T + model.pre_logits.fc.bias)
        linear = model.head
        if "head_norm" in how:
            batch_norm, linear = model.head
            token = (token - batch_norm.running_mean) / (batch_norm.running_var + batch_norm.eps).sqrt()
        wanted = token @ linear.weight.T + linear.bias
        torch.testing.assert_close(scores[:, place // 3, place % 3], wanted)


@torch.inference_mode()
@pytest.mark.parametrize("token_head", [True, False])
def test_lv_vit_is_asked_by_its_tokens_own_classifier_where_it_has_one(token_head):
    model = stirred(
        LVViT(**SMALL_VIT, stem_channels=8, token_head=token_head, output="cls_plus_max" if token_head else "cls")
    )
    patches = model.encode(model.embed(pictures(32, 48))).patches
    layer = model.aux_head if token_head else model.head
    wanted = (patches @ layer.weight.T + layer.bias).reshape(2, 2, 3, 7)
    torch.testing.assert_close(dense_scores(model, pictures(32, 48)), wanted)


@torch.inference_mode()
@pytest.mark.parametrize(
    "options",
    [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}, {"reg_tokens": 3}],
)
def test_timms_vits_are_asked_at_each_patch_token(options):
    small = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model, images = small_timm("vit_tiny_patch16_224", (32, 48), **small, **options), pictures(32, 48)
    net = model.timm_model
    patches = net.forward_features(images)[:, net.num_prefix_tokens :]
    wanted = (net.fc_norm(patches) @ net.head.weight.T + net.head.bias).reshape(2, 2, 3, 7)
    torch.testing.assert_close(dense_scores(model, images), wanted)
    assert check_dense(model, (32, 48), channels=3) == (2, 3)


@torch.inference_mode()
def test_a_larger_picture_gives_a_finer_map_of_a_convolutional_net():
    model = small_timm("test_resnet")
    assert check_dense(model, (64, 64), channels=3) == (2, 2)
    assert check_dense(model, (96, 160), channels=3) == (3, 5)


@pytest.mark.parametrize("pooling", [AttentionPool2d, RotAttentionPool2d])
@pytest.mark.parametrize("trained", [False, True])
def test_attention_with_positions_is_refused_before_it_shows_them_and_after(pooling, trained):
    """As of CLIP's ResNets. Untrained its weights are all but equal, and it passes for a mean."""
    model = TimmBackbone("test_resnet", image_size=(64, 64), num_classes=7)
    width = model.timm_model.num_features
    torch.manual_seed(0)
    size = {"feat_size": 2} if pooling is AttentionPool2d else {"ref_feat_size": 2}
    pool = pooling(width, out_features=width, num_heads=4, head_dim=None, **size)
    model.timm_model.global_pool = pool.requires_grad_(False)
    if trained:
        for parameter in pool.parameters():
            parameter.mul_(8)
    else:
        nn.init.zeros_(model.timm_model.fc.weight)
    with pytest.raises(UserError, match="classifies by where its features lie"):
        check_dense(model.eval(), (64, 64), channels=3)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "vit_tiny_patch16_224"])
def test_an_untrained_head_that_is_blind_to_places_is_let_through_and_left_as_it_was(name):
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2} if "vit" in name else {}
    model = TimmBackbone(name, image_size=64, num_classes=7, options=small)
    with torch.no_grad():
        model.timm_model.get_classifier().weight.zero_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert check_dense(model.eval(), (64, 64), channels=3)[0] > 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class Corner(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps[:, :, 0, 0]


def test_what_has_no_classifier_for_a_place_is_refused():
    encoder = VisionTransformer(**SMALL_VIT | {"num_classes": 0})
    mae = MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    with pytest.raises(UserError, match="MaskedAutoencoder has no classifier"):
        check_dense(mae, (32, 32), channels=3)
    by_place = small_timm("test_resnet")
    by_place.timm_model.global_pool = Corner()
    with pytest.raises(UserError, match="classifies by where its features lie"):
        check_dense(by_place, (64, 64), channels=3)
    with pytest.raises(UserError, match=r"cannot be asked at every place of a 64x64 picture"):
        check_dense(small_timm("coat_tiny", (64, 64)), (64, 64), channels=3)
    with pytest.raises(UserError, match="pictures are 3x64x64"):
        check_dense(VisionTransformer(**SMALL_VIT), (64, 64), channels=3)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_best_are_kept_over_the_mean_of_the_others(k):
    scores = 5 * torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    values, numbers = top_scores(scores, k)
    assert (values.dtype, numbers.dtype) == (torch.float16, torch.int32)
    for b in range(2):
        for row in range(3):
            for column in range(4):
                cell = scores[b, row, column].tolist()
                best = sorted(range(6), key=lambda i: -cell[i])[:k]
                others = [cell[i] for i in range(6) if i not in best] or cell
                wanted = [cell[i] - sum(others) / len(others) for i in best]
                assert numbers[b, :, row, column].tolist() == best
                np.testing.assert_allclose(values[b, :, row, column].tolist(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_teacher_sees_the_whole_picture_squashed(channels):
    image = np.zeros((20, 80, channels), np.uint8)
    image[:, :20] = 200  # the left quarter, which a centre crop would lose
    for wanted in (1, 3):
        squash = Squash((16, 16), channels=wanted, interpolation="bilinear", resizer="torch")
        seen = squash.fixed(image)
        assert seen.shape == (wanted, 16, 16)
        assert (seen[:, :, :3] == 200).all()
        assert (seen[:, :, 5:] == 0).all()


def teacher_of(model: nn.Module, **changed) -> Teacher:
    given = {
        "model": model, "columns": range(7), "image_size": (32, 48), "mean": [0.5], "std": [0.5], "channels": 3,
        "interpolation": "bilinear", "resizer": "torch", "facts": {"name": "x", "weights_sha256": "y"},
    }  # fmt: skip
    return Teacher(**(given | changed))


def test_maps_come_in_the_pictures_order_and_the_datas_class_numbers():
    model = stirred(VisionTransformer(**SMALL_VIT))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    images = ArrayImages(pixels, np.zeros(5, np.int64), list("abcde"))
    how = {"k": 2, "autocast": contextlib.nullcontext, "workers": 0}
    columns = [6, 0, 3]
    found = list(score(teacher_of(model, columns=columns), images, batch_size=2, **how))
    assert [len(values) for values, _ in found] == [2, 2, 1]
    with torch.inference_mode():
        all_of = dense_scores(model, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)[..., columns]
    best = all_of.topk(2, dim=3).indices.permute(0, 3, 1, 2).numpy()
    np.testing.assert_array_equal(np.concatenate([numbers for _, numbers in found]), best)


def test_scores_that_are_no_numbers_are_refused_by_the_pictures_name():
    model = stirred(VisionTransformer(**SMALL_VIT))
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    images = ArrayImages(np.zeros((2, 32, 48, 3), np.uint8), np.zeros(2, np.int64), ["first.png", "b.png"])
    with pytest.raises(UserError, match=r"first\.png: the teacher's scores of it are not finite"):
        list(score(teacher_of(model), images, k=2, batch_size=2, autocast=contextlib.nullcontext, workers=0))


# ---- official files --------------------------------------------------------------------------------------------------


def test_official_files_are_found_by_last_folder_and_name_up_to_the_first_dot(tmp_path):
    for file in ("cat/a.pt", "deep/b.pt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = official_paths(tmp_path, ["cat/a.x.JPEG", "dog/very/deep/b.png"])
    assert found == [tmp_path / "cat/a.pt", tmp_path / "deep/b.pt"]
    with pytest.raises(UserError, match=r"2 of 3 pictures have no file .* first: cat/c\.pt"):
        official_paths(tmp_path, ["cat/a.png", "cat/c.png", "dog/d.png"])
    with pytest.raises(UserError, match=r"cat/a\.1\.png and cat/a\.2\.png would both have cat/a\.pt"):
        official_paths(tmp_path, ["cat/a.1.png", "cat/a.2.png"])


def test_official_maps_keep_their_values_and_get_the_datas_class_numbers(tmp_path):
    classes = ["class1", "class10", "class2"]  # as text sorts them; timm has 1, 2, 10
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).half()
    numbers = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 4, 3)
    torch.save(torch.stack([values, numbers.half()]), tmp_path / "a.pt")
    [(found, named)] = official_maps([tmp_path / "a.pt"], classes=classes, like=(2, 4, 3))
    np.testing.assert_array_equal(found[0], values.numpy())
    assert named[0, 0].tolist() == [[0] * 3] * 4
    assert named[0, 1].tolist() == [[2] * 3] * 4
    assert (found.dtype, named.dtype) == (np.float16, np.int32)
    with pytest.raises(UserError, match=r"a\.pt: maps of shape \[2, 4, 3\], in the first file \[2, 4, 4\]"):
        list(official_maps([tmp_path / "a.pt"], classes=classes, like=(2, 4, 4)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3, 2, 4, 4).half(), r"found torch\.float16 \[3, 2, 4, 4\]"),
        (torch.zeros(2, 2, 4, 4).int(), r"found torch\.int32"),
        ({"maps": torch.zeros(1)}, "found dict"),
        (torch.full((2, 2, 4, 4), 9.0).half(), "from 9 to 9: not whole numbers from 0 to 2"),
        (torch.stack([torch.full((2, 4, 4), torch.inf), torch.zeros(2, 4, 4)]).half(), "not finite"),
        (b"text", "damaged, or no PyTorch file"),
    ],
)
def test_an_official_file_that_is_none_is_refused_by_name(tmp_path, content, said):
    file = tmp_path / "a.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=rf"a\.pt: .*{said}"):
        read_official_file(file, num_classes=3)


def test_an_official_file_cannot_run_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save(Harmful(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: damaged"):
        read_official_file(tmp_path / "a.pt", num_classes=3)
    assert not (tmp_path / "harm").exists()


def test_official_files_hold_no_more_classes_than_they_can_number(tmp_path):
    torch.save(torch.zeros(2, 2, 4, 4).half(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: 2049 classes"):
        read_official_file(tmp_path / "a.pt", num_classes=2049)
