"""CIFAR, Imagenette, flowers and pets: fetched whole or not at all, unpacked safely, read as torchvision reads them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets

from tests.data.pictures import picture
from vitexp.data import download
from vitexp.data.download import Remote, ensure, unpack
from vitexp.data.images import decode
from vitexp.data.sources import torchvision_sets
from vitexp.data.sources.torchvision_sets import cifar10, cifar100, flowers102, imagenette, pets
from vitexp.errors import UserError


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def tar_gz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


class Server:
    """Files at http://127.0.0.1; `asked` counts downloads; `cut` answers with half of the file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                outer.asked.append(name)
                data = outer.files.get(name)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if outer.cut else data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=functools.partial(self.server.serve_forever, 0.02), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def cifar_files(*, hundred: bool = False, by_column: bool = False) -> tuple[dict[str, bytes], np.ndarray]:
    """(the archive's files in CIFAR's format, the pictures of all batches as rows): 4 a batch, 5 + 1 batches."""
    rng = np.random.default_rng(0)
    parts = ["train", "test"] if hundred else [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    files, rows = {}, []
    for part in parts:
        data = rng.integers(0, 256, (4, 3072), np.uint8)
        rows.append(data)
        labels: dict[str, Any] = (
            {"fine_labels": [99, 0, 5, 7], "coarse_labels": [0, 0, 0, 0]} if hundred else {"labels": [3, 1, 4, 9]}
        )
        content = {"data": np.asfortranarray(data) if by_column else data, **labels, "filenames": ["a", "b", "c", "d"]}
        files[part] = pickle.dumps(content, protocol=2)
    if hundred:
        files["meta"] = pickle.dumps({"fine_label_names": [f"f{k:02d}" for k in range(100)]}, protocol=2)
    else:
        files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij"), "num_vis": 3072}, protocol=2)
    folder = datasets.CIFAR100.base_folder if hundred else datasets.CIFAR10.base_folder
    return {f"{folder}/{name}": data for name, data in files.items()}, np.stack(rows)


@pytest.fixture
def serve_cifar(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    """Puts an archive on the server and makes torchvision's class expect it."""

    def serve(files: dict[str, bytes], official: type[datasets.CIFAR10] = datasets.CIFAR10) -> Server:
        archive = tar_gz(files)
        server.files[official.filename] = archive
        sums = {name.rsplit("/", 1)[-1]: md5(data) for name, data in files.items()}
        monkeypatch.setattr(official, "url", f"{server.url}/{official.filename}")
        monkeypatch.setattr(official, "tgz_md5", md5(archive))
        for key in ("train_list", "test_list"):
            monkeypatch.setattr(official, key, [[name, sums[name]] for name, _ in getattr(official, key)])
        monkeypatch.setattr(official, "meta", {**official.meta, "md5": sums[official.meta["filename"]]})
        return server

    return serve


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_cifar_is_read_as_torchvision_reads_it(
    root: Path, serve_cifar: Callable[..., Server], hundred: bool, by_column: bool
) -> None:
    read, official = (cifar100, datasets.CIFAR100) if hundred else (cifar10, datasets.CIFAR10)
    files, rows = cifar_files(hundred=hundred, by_column=by_column)
    served = serve_cifar(files, official)
    source = read(str(root))
    for split, train in ((source.train, True), (source.val, False)):
        theirs = official(root, train=train)
        assert source.classes == theirs.classes
        assert split.labels.tolist() == theirs.targets
        assert np.array_equal(np.stack([split.read(i) for i in range(len(split))]), theirs.data)
    assert np.array_equal(source.train.read(1)[..., 2].ravel(), rows[0][1, 2048:])
    assert len(set(source.train.names)) == len(source.train) == (4 if hundred else 20)
    assert read(str(root)).fingerprint() == source.fingerprint()
    assert len(served.asked) == 1
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == [official.base_folder]


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["value", "key", "instead of the dictionary", "the classes"])
def test_a_hostile_pickle_with_the_right_checksum_runs_nothing(
    root: Path, tmp_path: Path, serve_cifar: Callable[..., Server], where: str
) -> None:
    marker = tmp_path / "ran"
    files, _ = cifar_files()
    content = {
        "value": {"data": Hostile(marker)},
        "key": {Hostile(marker): 1},
        "instead of the dictionary": Hostile(marker),
        "the classes": {"label_names": Hostile(marker)},
    }[where]
    name = "batches.meta" if where == "the classes" else "data_batch_2"
    files[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    serve_cifar(files)
    with pytest.raises(UserError, match=rf"{name}: refused, nothing of it was run .*mkdir"):
        cifar10(str(root))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "object"])
def test_not_even_builtins_are_given_to_a_pickle(name: str) -> None:
    stream = f"cbuiltins\n{name}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match=name):
        torchvision_sets._NoCode(io.BytesIO(stream)).load()


@pytest.mark.parametrize(
    "content",
    [
        {"data": np.zeros((4, 3072), np.float32), "labels": [1, 2, 3, 4]},
        {"data": np.zeros((4, 3071), np.uint8), "labels": [1, 2, 3, 4]},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [1, 2, 3]},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [1, 2, 3, 10]},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [1, 2, 3, "4"]},
        {"data": [1], "labels": [1]},
        {"labels": [1]},
        [1, 2],
    ],
)
def test_a_batch_that_is_none_of_cifars_is_named(
    root: Path, serve_cifar: Callable[..., Server], content: object
) -> None:
    files, _ = cifar_files()
    files["cifar-10-batches-py/test_batch"] = pickle.dumps(content, protocol=2)
    serve_cifar(files)
    with pytest.raises(UserError, match=r"cifar-10-batches-py/test_batch"):
        cifar10(str(root))


def test_a_changed_file_is_named_with_what_to_do(root: Path, serve_cifar: Callable[..., Server]) -> None:
    serve_cifar(cifar_files()[0])
    cifar10(str(root))
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"data=cifar10: .*data_batch_3 is damaged or changed(.|\n)*delete the folder"):
        cifar10(str(root))
    batch.unlink()
    with pytest.raises(UserError, match=r"data_batch_3: No such file.*delete cifar-10-batches-py/ and run again"):
        cifar10(str(root))


def test_cifar_is_color(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.channels=1"):
        cifar10(str(root), channels=1)


# ---- Sets of photographs ---------------------------------------------------------------------------------------------

WNIDS = sorted(datasets.Imagenette._WNID_TO_CLASS)


def serve_imagenette(server: Server, monkeypatch: pytest.MonkeyPatch, *, leave_out: str = "") -> None:
    files = {
        f"imagenette2-160/{split}/{wnid}/{wnid}_{k}.JPEG": picture(10 * n + k)
        for split, count in (("train", 3), ("val", 2))
        for n, wnid in enumerate(WNIDS)
        for k in range(count)
    }
    files = {name: data for name, data in files.items() if name != leave_out} | {"imagenette2-160/noisy.csv": b"a,b"}
    archive = tar_gz(files)
    server.files["imagenette2-160.tgz"] = archive
    known = {**datasets.Imagenette._ARCHIVES, "160px": (f"{server.url}/imagenette2-160.tgz", md5(archive))}
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", known)
    monkeypatch.setattr(torchvision_sets, "IMAGENETTE_COUNTS", {"train": 30, "val": 20})


def test_imagenette_has_torchvisions_labels_and_the_official_names(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_imagenette(server, monkeypatch)
    source = imagenette(str(root), size="160px")
    assert source.classes[:2] == ["tench", "English springer"]
    for split, key in ((source.train, "train"), (source.val, "val")):
        theirs = datasets.Imagenette(root, split=key, size="160px")
        assert split.labels.tolist() == [label for _, label in theirs._samples]
        assert list(split.names) == [str(Path(p).relative_to(theirs._image_root)) for p, _ in theirs._samples]
    assert np.array_equal(source.train.read(4), decode(picture(11), "a"))
    with pytest.raises(UserError, match=r"data\.size=320: expected one of 160px, 320px, full\. Did you mean '320px'"):
        imagenette(str(root), size="320")


def test_an_incomplete_imagenette_is_not_trained_on(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_imagenette(server, monkeypatch, leave_out=f"imagenette2-160/train/{WNIDS[0]}/{WNIDS[0]}_1.JPEG")
    with pytest.raises(UserError, match=r"holds 29 train \+ 20 val in 10 classes, not 30 train \+ 20 val in 10"):
        imagenette(str(root), size="160px")


def serve_flowers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def mat(content: dict[str, np.ndarray]) -> bytes:
        out = io.BytesIO()
        savemat(out, content)
        return out.getvalue()

    files = {
        "102flowers.tgz": tar_gz({f"jpg/image_{n:05d}.jpg": picture(n) for n in range(1, 11)}),
        "imagelabels.mat": mat({"labels": np.array([[5, 5, 102, 1, 1, 7, 7, 7, 50, 2]], np.uint8)}),
        "setid.mat": mat({"trnid": np.array([[9, 2, 4]]), "valid": np.array([[1, 3]]), "tstid": np.array([[5, 6, 8]])}),
    }
    server.files |= files
    official = datasets.Flowers102
    known = {key: (name, md5(files[name])) for key, (name, _) in official._file_dict.items()}
    monkeypatch.setattr(official, "_file_dict", known)
    monkeypatch.setattr(official, "_download_url_prefix", server.url + "/")


@pytest.mark.parametrize(("val_split", "theirs"), [("test", ("train", "val")), ("val", ("train",))])
def test_flowers_have_torchvisions_splits_and_labels(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch, val_split: str, theirs: tuple[str, ...]
) -> None:
    serve_flowers(server, monkeypatch)
    source = flowers102(str(root), val_split=val_split)
    for split, keys in ((source.train, theirs), (source.val, (val_split,))):
        official = [datasets.Flowers102(root, split=key) for key in keys]
        expected = {(f.name, k) for part in official for f, k in zip(part._image_files, part._labels, strict=True)}
        assert {(Path(n).name, k) for n, k in zip(split.names, split.labels.tolist(), strict=True)} == expected
        assert len(split) == len(expected)
    assert len(source.classes) == 102
    number = int(source.train.names[0][-9:-4])
    assert np.array_equal(source.train.read(0), decode(picture(number), "a"))
    (root / "flowers-102" / "jpg" / "image_00009.jpg").unlink()
    with pytest.raises(UserError, match=r"data=flowers102: .*image_00009\.jpg: No such file.*delete the folder .*jpg"):
        flowers102(str(root), val_split=val_split)


def test_a_half_downloaded_label_file_of_torchvision_is_not_used(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_flowers(server, monkeypatch)
    (root / "flowers-102").mkdir()
    (root / "flowers-102" / "setid.mat").write_bytes(server.files["setid.mat"][:100])
    with pytest.raises(UserError, match=r"setid\.mat is damaged or changed; delete it and run again"):
        flowers102(str(root))


def serve_pets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [
        ("Abyssinian_100", 1, 1),
        ("great_pyrenees_7", 3, 2),
        ("american_bulldog_10", 2, 2),
        ("Abyssinian_1", 1, 1),
    ]
    test = [("great_pyrenees_1", 3, 2), ("american_bulldog_2", 2, 2)]
    images = {f"images/{stem}.jpg": picture(n) for n, (stem, *_) in enumerate(train + test)}
    lists = {
        f"annotations/{name}.txt": "".join(f"{stem} {breed} {kind} 1\n" for stem, breed, kind in rows).encode()
        for name, rows in (("trainval", train), ("test", test))
    }
    server.files |= {"images.tar.gz": tar_gz(images), "annotations.tar.gz": tar_gz(lists)}
    known = tuple((f"{server.url}/{name}", md5(server.files[name])) for name in ("images.tar.gz", "annotations.tar.gz"))
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", known)


def test_pets_have_torchvisions_names_and_labels(root: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_pets(server, monkeypatch)
    source = pets(str(root))
    for split, key in ((source.train, "trainval"), (source.val, "test")):
        theirs = datasets.OxfordIIITPet(root, split=key)
        expected = sorted((f"images/{p.name}", k) for p, k in zip(theirs._images, theirs._labels, strict=True))
        assert list(zip(split.names, split.labels.tolist(), strict=True)) == expected
    assert source.classes == ["Abyssinian", "American Bulldog", "Great Pyrenees"]
    assert np.array_equal(source.val.read(0), decode(picture(5), "a"))
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Abyssinian_1 one 1 1\n")
    with pytest.raises(UserError, match=r"data=pets: .*test\.txt cannot be read; delete the folder annotations/"):
        pets(str(root))


def test_a_mistyped_root_is_refused_and_the_default_one_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch, serve_cifar: Callable[..., Server]
) -> None:
    serve_cifar(cifar_files()[0])
    with pytest.raises(UserError, match=r"data\.root=.*dta does not exist"):
        cifar10(str(root.parent / "dta"))
    monkeypatch.setenv("HOME", str(root.parent))
    cifar10()
    assert (root.parent / ".cache/vitexp/cifar10/cifar-10-batches-py/test_batch").is_file()


# ---- Fetching --------------------------------------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def one_file(server: Server, data: bytes = b"x" * 100_000) -> tuple[Remote, ...]:
    server.files["set.mat"] = data
    return (Remote(f"{server.url}/set.mat", md5(data)),)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", r"broke off after 50,000 of 100,000 bytes; nothing was kept"),
        ("changed", r"is not the file expected \(md5 .*\); nothing was kept"),
        ("gone", r"answers 404"),
        ("no server", r"cannot be downloaded \(.*refused.*\); nothing was kept"),
        ("refused", r"set\.mat not in .*, and data\.download=false\nput set\.mat \(md5 [0-9a-f]{32}\) there"),
    ],
)
def test_what_does_not_arrive_is_said_and_leaves_nothing(root: Path, server: Server, fault: str, said: str) -> None:
    remotes = one_file(server)
    if fault == "cut":
        server.cut = True
    elif fault == "changed":
        server.files["set.mat"] = b"y" * 100_000
    elif fault == "gone":
        server.files.clear()
    elif fault == "no server":
        remotes = (Remote("http://127.0.0.1:9/set.mat", "0" * 32),)
    with pytest.raises(UserError, match=said) as caught:
        ensure("some", root, remotes, download=fault != "refused")
    assert left_in(root) == []
    assert "data=some: " in str(caught.value)
    assert "set.mat" in str(caught.value)
    assert str(root) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_download_that_broke_off_is_made_again_from_its_start(root: Path, server: Server) -> None:
    remotes = one_file(server)
    server.cut = True
    with pytest.raises(UserError):
        ensure("some", root, remotes, download=True)
    server.cut = False
    ensure("some", root, remotes, download=True)
    assert (root / "set.mat").read_bytes() == server.files["set.mat"]


def test_what_a_killed_process_left_is_removed(root: Path, server: Server) -> None:
    left = root / (download._STAGING + "abc")
    left.mkdir()
    (left / "set.mat").write_bytes(b"half")
    ensure("some", root, one_file(server), download=True)
    assert left_in(root) == ["set.mat"]


def test_an_archive_put_there_by_hand_is_used_and_kept_and_half_of_one_is_not(root: Path, server: Server) -> None:
    archive = tar_gz({"inner/a.txt": b"a"})
    (root / "set.tgz").write_bytes(archive)
    ensure("some", root, (Remote("http://127.0.0.1:9/set.tgz", md5(archive), ("inner",)),), download=False)
    assert left_in(root) == ["inner", "set.tgz"]

    other = root / "other"
    other.mkdir()
    (other / "set.tgz").write_bytes(archive[:-7])
    with pytest.raises(UserError, match=r"inner not in"):
        ensure("some", other, (Remote("http://127.0.0.1:9/set.tgz", md5(archive), ("inner",)),), download=False)
    server.files["set.tgz"] = archive
    ensure("some", other, (Remote(f"{server.url}/set.tgz", md5(archive), ("inner",)),), download=True)
    assert left_in(other) == ["inner"]


def test_a_full_disk_is_said_with_the_folder_and_leaves_nothing(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    remotes = one_file(server)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"data=some: no room in .*data: needs 0\.00 GB.*\n.*data\.root"):
        ensure("some", root, remotes, download=True)
    assert left_in(root) == []


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_gz({"inner/a.txt": b"a", "inner/b.txt": b"b"})
    server.files["set.tgz"] = archive

    def full(source: Any, target: Any, size: int) -> None:
        target.write(b"a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"no room in .*the disk is full"):
        ensure("some", root, (Remote(f"{server.url}/set.tgz", md5(archive), ("inner",)),), download=True)
    assert left_in(root) == ["set.tgz"]  # whole and verified: not downloaded again


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data=some: .*file.*\n.*data\.root"):
        ensure("some", tmp_path / "file" / "below", one_file(server), download=True)


def _ensure_in_process(folder: str, url: str, digest: str, start: Any) -> None:
    start.wait()
    ensure("some", Path(folder), (Remote(url, digest, ("inner",)),), download=True)
    assert len(list((Path(folder) / "inner").iterdir())) == 50


def test_processes_that_start_together_download_once(root: Path, server: Server) -> None:
    archive = tar_gz({f"inner/{k}.bin": os.urandom(2000) for k in range(50)})
    server.files["set.tgz"] = archive
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    arguments = (str(root), f"{server.url}/set.tgz", md5(archive), start)
    ranks = [context.Process(target=_ensure_in_process, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert server.asked == ["set.tgz"]
    assert left_in(root) == ["inner"]


# ---- Hostile archives ------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def crafted(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member("set/good.txt", size=4), io.BytesIO(b"good"))
        for info in members:
            tar.addfile(info, io.BytesIO(b"\0" * info.size) if info.isreg() else None)
    return path


HOSTILE = {
    "up": ([member("../evil.txt")], "would lie outside"),
    "up inside": ([member("set/../../evil.txt")], "would lie outside"),
    "absolute": ([member("/tmp/vitexp-evil.txt")], "would lie outside"),
    "backslash": ([member("..\\evil.txt")], "would lie outside"),
    "folder above": ([member("../evil", tarfile.DIRTYPE)], "would lie outside"),
    "symlink": ([member("set/l", tarfile.SYMTYPE, link="/etc")], "is a link"),
    "symlink inside": ([member("set/l", tarfile.SYMTYPE, link="good.txt")], "is a link"),
    "symlink, then through it": ([member("l", tarfile.SYMTYPE, link=".."), member("l/evil.txt")], "is a link"),
    "hardlink": ([member("set/h", tarfile.LNKTYPE, link="/etc/passwd")], "is a link"),
    "device": ([member("set/d", tarfile.CHRTYPE)], "no plain file or folder"),
    "pipe": ([member("set/p", tarfile.FIFOTYPE)], "no plain file or folder"),
    "twice": ([member("set/good.txt")], "two members have one name"),
    "file as folder": ([member("set/good.txt/evil.txt")], "two members have one name"),
    "folder as file": ([member("set", size=1)], "two members have one name"),
    "bomb": ([member("set/zeros", size=50_000_000)], r"more than 20 times its [\d,]+ bytes"),
    "many": ([member(f"set/{k}") for k in range(20)], "more than 15 members"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(download, "MEMBER_LIMIT", 15)
    members, said = HOSTILE[what]
    archive = crafted(tmp_path / "set.tgz", *members)
    with pytest.raises(UserError, match=rf"set\.tgz: unsafe archive, refused: .*{said}"):
        unpack(archive, tmp_path / "here")
    assert left_in(tmp_path) == ["set.tgz"]
    assert not Path("/tmp/vitexp-evil.txt").exists()
    assert not (tmp_path.parent / "evil.txt").exists()


def test_headers_that_claim_gigabytes_are_not_read_into_memory(tmp_path: Path) -> None:
    head = member("x", tarfile.XHDTYPE, size=1 << 40).tobuf(tarfile.GNU_FORMAT)
    archive = tmp_path / "set.tgz"
    with gzip.open(archive, "wb", compresslevel=1) as out:
        out.write(head)
        for _ in range(8):
            out.write(b"\0" * (1 << 20))
    with pytest.raises(UserError, match="it unpacks to more than"):
        unpack(archive, tmp_path / "here")
    assert left_in(tmp_path) == ["set.tgz"]


@pytest.mark.parametrize("cut", [0, 1, 10, 60, 100])
def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path: Path, cut: int) -> None:
    whole = tar_gz({"set/a": os.urandom(300), "set/b": os.urandom(300)})
    archive = tmp_path / "set.tgz"
    archive.write_bytes(whole[: len(whole) * cut // 100] if cut < 100 else b"<html>" + whole)
    with pytest.raises(UserError, match=r"set\.tgz: damaged, or no \.tar\.gz archive"):
        unpack(archive, tmp_path / "here")
    assert left_in(tmp_path) == ["set.tgz"]


def test_an_archive_of_the_right_checksum_is_unpacked_no_less_carefully(root: Path) -> None:
    crafted(root / "set.tgz", member("../evil.txt"))
    remote = Remote("http://127.0.0.1:9/set.tgz", download.md5_of(root / "set.tgz"), ("set",))
    with pytest.raises(UserError, match="unsafe archive"):
        ensure("some", root, (remote,), download=True)
    assert left_in(root) == ["set.tgz"]
    assert not (root.parent / "evil.txt").exists()
