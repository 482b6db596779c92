"""timm:<name> and hf:<owner/name>: the hub's own client against a small hub on this machine, its cache, and no hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZE = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
TIMM = "test_vit.r160_in1k"  # 0.4 M parameters


class Hub:
    """Repositories in memory: {owner/name: {file name: its bytes}}, and the requests that came."""

    def __init__(self, folder: Path) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.asked.append(self.path)
                found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
                files = hub.repositories.get(found[1]) if found else None
                content = (files or {}).get(found[2]) if found else None
                error = "RepoNotFound" if files is None else "EntryNotFound" if content is None else None
                if found and found[1] in hub.gated:
                    error = "GatedRepo"
                self.send_response({None: 200, "GatedRepo": 403}.get(error, 404))
                if error:
                    self.send_header("X-Error-Code", error)
                content = b"" if error or content is None else content
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{len(content)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield made
    made.server.shutdown()
    made.server.server_close()


def in_bytes(tmp_path: Path, state: dict[str, torch.Tensor], name: str = "model.safetensors") -> bytes:
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path.read_bytes()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_is_read_and_later_taken_from_the_cache(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    source = VisionTransformer(**SIZE, init="timm")
    hub.repositories["some/vit-b.1"] = {file: in_bytes(tmp_path, source.state_dict(), file)}
    target = VisionTransformer(**SIZE)
    report = load_weights(target, "hf:some/vit-b.1")
    assert str(report).startswith(f"hf:some/vit-b.1 ({file}) (timm): ")
    assert all(torch.equal(tensor, target.state_dict()[key]) for key, tensor in source.state_dict().items())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert load_weights(VisionTransformer(**SIZE), "hf:some/vit-b.1").loaded == report.loaded
    assert len(hub.asked) == asked


def test_timms_weights_fill_our_vit_and_timms_and_are_called_by_their_tag(tmp_path: Path, hub: Hub) -> None:
    theirs = timm.create_model("test_vit").eval()
    hub.repositories[f"timm/{TIMM}"] = {"model.safetensors": in_bytes(tmp_path, theirs.state_dict())}
    ours = VisionTransformer(
        image_size=160, patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3.0, init="timm"
    )
    report = load_weights(ours.eval(), "timm:test_vit")
    assert str(report).startswith(f"timm:{TIMM} (timm): ")
    assert (report.head, report.missing, report.unexpected) == ("kept", (), ())
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    smaller = TimmBackbone("test_vit", image_size=96, num_classes=3)
    report = load_weights(smaller, f"timm:{TIMM}")
    assert (report.head, report.resized.new_grid, report.resized.mode) == ("fresh", (6, 6), "timm")


def refused(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(VisionTransformer(**SIZE), name)
    said = str(caught.value)
    assert said.startswith(f"{name}: ")
    assert len(said.splitlines()) <= 3
    return said


@pytest.mark.parametrize("name", ["hf:google/vit-base-patch16-224", "timm:vit_tiny_patch16_224"])
def test_without_a_network_it_says_so_and_what_else_to_give(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(name)
    assert "the hub does not answer" in said
    assert "init_from=<file>" in said
    assert not hub.asked


def test_a_hub_that_refuses_the_connection_is_no_network_either(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    assert "the hub does not answer" in refused("hf:google/vit-base-patch16-224")


def test_names_that_no_hub_knows_are_told_from_files_that_it_lacks(tmp_path: Path, hub: Hub) -> None:
    hub.repositories["some/texts"] = {"README.md": b"words"}
    hub.repositories["some/secret"] = {"model.safetensors": b"weights"}
    hub.gated.add("some/secret")
    hub.repositories["some/broken"] = {
        "model.safetensors": in_bytes(tmp_path, build_model("vit_debug").state_dict())[:9]
    }
    assert "no such repository" in refused("hf:nobody/nothing")
    assert "neither model.safetensors nor pytorch_model.bin" in refused("hf:some/texts")
    assert "HF_TOKEN" in refused("hf:some/secret")
    with pytest.raises(UserError, match=r"model.safetensors: damaged or no safetensors file"):
        load_weights(VisionTransformer(**SIZE), "hf:some/broken")
    assert "hf:<owner>/<name>" in refused("hf:vit-base-patch16-224")
    hub.asked.clear()
    assert "vit_base_patch16_224" in refused("timm:vit_bsae_patch16_224")
    assert TIMM in refused("timm:test_vit.r160_in2k")
    assert "timm has no weights" in refused("timm:vit_base_patch16_18x2_224")
    assert not hub.asked
