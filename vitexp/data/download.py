"""Archives of public data sets: fetched whole or not at all, unpacked only where they may, once for all processes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import logging
import os
import shutil
import ssl
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from filelock import FileLock, Timeout
from tqdm import tqdm

from vitexp.data.images import printable
from vitexp.errors import UserError

MEMBER_LIMIT = 100_000  # files and folders of one archive; the largest set here has some 37,000
RATIO_LIMIT = 20  # bytes unpacked for one of the archive; photographs hardly shrink
RATIO_FREE = 4 << 20  # bytes that any archive may unpack to, however small it is: 512 of them are each member's header
TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
_STAGING = ".unfinished-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file on a server. With `unpacked` it is a gzipped tar of which those top folders or files are wanted."""

    url: str
    md5: str
    unpacked: tuple[str, ...] = ()

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def leaves(self) -> tuple[str, ...]:
        """What lies in the folder once it has been fetched."""
        return self.unpacked or (self.filename,)


def ensure(name: str, folder: Path, remotes: tuple[Remote, ...], *, download: bool) -> None:
    """Returns when `folder` holds what all of the remotes leave, fetching what is missing.

    Whatever has its final name is whole: a file is renamed to it once its md5 fits, a folder once all of it is written.
    An archive with its right md5 that a person put there is taken instead of a download. Several processes at once: one
    works, the others wait. Raises UserError naming the data set, the path and what to do."""
    if not _missing(folder, remotes):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(name, folder):
            _remove_leftovers(folder)
            for remote in _missing(folder, remotes):
                _provide(name, folder, remote, download=download)
    except OSError as error:
        _refuse_os_error(name, folder, error)


def _missing(folder: Path, remotes: tuple[Remote, ...]) -> list[Remote]:
    return [remote for remote in remotes if not all((folder / leaf).exists() for leaf in remote.leaves)]


@contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    """Given back by the system when its holder is killed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _log.warning("data=%s: another process is fetching into %s; waiting for it", name, folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed. Under the lock, so nobody works in them."""
    for entry in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(entry, ignore_errors=True)


def _provide(name: str, folder: Path, remote: Remote, *, download: bool) -> None:
    file = folder / remote.filename
    shown = printable(str(file))
    fetched = False
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as staging:
        if (there := file.exists()) and md5_of(file) != remote.md5:
            _log.warning("data=%s: %s is damaged or only half of it is there; not used", name, shown)
            there = False
        if not there:
            if not download:
                raise UserError(
                    f"data={name}: {' and '.join(remote.leaves)} not in {printable(str(folder))}, and "
                    f"data.download=false\nput {remote.filename} (md5 {remote.md5}) there, or set data.download=true"
                )
            part = Path(staging) / remote.filename
            _fetch(name, remote, part, shown=shown)
            os.replace(part, file)
            fetched = True
        if not remote.unpacked:
            return
        content = Path(staging) / "content"
        unpack(file, content)
        for leaf in remote.unpacked:
            if not (content / leaf).exists():
                raise UserError(f"data={name}: {shown} holds no {leaf}; this is another archive than the one expected")
        for leaf in remote.unpacked:
            if not (folder / leaf).exists():
                os.replace(content / leaf, folder / leaf)
    if fetched:  # one that a person put there stays
        file.unlink()


def md5_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(name: str, remote: Remote, part: Path, *, shown: str) -> None:
    """Raises UserError where the file does not arrive whole and right."""
    by_hand = f"without a network, put {remote.filename} (md5 {remote.md5}) where it would be: {shown}"
    digest = hashlib.md5(usedforsecurity=False)
    request = urllib.request.Request(remote.url, headers={"User-Agent": "vitexp"})
    received, length = 0, None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as out:
            length = response.length
            _check_room(name, part.parent.parent, length or 0)
            size = "" if length is None else f" ({length / 1e6:,.1f} MB)"
            _log.info("downloading %s%s", remote.url, size)
            with tqdm(
                total=length, desc=remote.filename, unit="B", unit_scale=True, delay=2, leave=False, disable=None
            ) as bar:
                while chunk := response.read(_CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
            out.flush()
            os.fsync(out.fileno())
    except urllib.error.HTTPError as error:
        raise UserError(
            f"data={name}: {remote.url} answers {error.code} {error.reason}\nfetch it elsewhere: {by_hand}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"data={name}: {remote.url} cannot be downloaded ({printable(str(reason))[:200]}); nothing was kept\n"
            f"run again; {by_hand}"
        ) from error
    if length is not None and received != length:
        raise UserError(
            f"data={name}: the download of {remote.url} broke off after {received:,} of {length:,} bytes; nothing was "
            f"kept\nrun again; {by_hand}"
        )
    if digest.hexdigest() != remote.md5:
        raise UserError(
            f"data={name}: {remote.url} is not the file expected (md5 {digest.hexdigest()}, not {remote.md5}); nothing "
            f"was kept\nrun again; {by_hand}"
        )


# ---- Archives --------------------------------------------------------------------------------------------------------


def unpack(archive: Path, target: Path) -> None:
    """The files and folders of a .tar.gz below `target`, which must not exist yet.

    The whole archive is looked through before a byte is written. Refused as UserError: names that are absolute or go
    up, links, devices and whatever else is no plain file or folder, two members of one name, more than MEMBER_LIMIT
    members, more than RATIO_LIMIT times its own size. Python's own extraction has let such through (CVE-2025-4517), so
    none of it is used. Owners, modes and times are not taken over."""
    where = printable(str(archive))
    try:
        _check_room(where, archive.parent, sum(member.size for member, _ in _members(archive)))
        target.mkdir()
        for member, content in _members(archive):
            path = target.joinpath(*PurePosixPath(member.name).parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            assert content is not None
            with open(path, "xb") as out:
                shutil.copyfileobj(content, out, _CHUNK)
                if out.tell() != member.size:
                    raise UserError(f"{where}: cut short at {printable(member.name)}; delete it")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise UserError(
            f"{where}: damaged, or no .tar.gz archive ({printable(str(error))[:200]}); delete it"
        ) from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"{where}: unsafe archive, refused: two members have one name ({error.filename})") from error
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """(member, its content), each member judged before its content is read."""

    def refuse(why: str) -> NoReturn:
        raise UserError(f"{printable(str(archive))}: unsafe archive, refused: {why}")

    limit = RATIO_LIMIT * archive.stat().st_size + RATIO_FREE
    total = 0
    with gzip.open(archive) as plain:
        bounded: Any = _Bounded(plain, limit, archive)  # of a file, streaming needs read() alone
        with tarfile.open(fileobj=bounded, mode="r|") as tar:
            for count, member in enumerate(tar, 1):
                shown = repr(printable(member.name)[:200])
                path = PurePosixPath(member.name)
                if count > MEMBER_LIMIT:
                    refuse(f"more than {MEMBER_LIMIT:,} members")
                if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
                    refuse(f"{shown} would lie outside")
                if member.issym() or member.islnk():
                    refuse(f"{shown} is a link")
                if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)) or member.issparse():
                    refuse(f"{shown} is no plain file or folder")
                total += member.size
                if member.size < 0 or total > limit:
                    refuse(f"it unpacks to more than {RATIO_LIMIT} times its {archive.stat().st_size:,} bytes")
                yield member, tar.extractfile(member) if member.isreg() else None


class _Bounded:
    """A stream that ends in UserError past `limit` bytes: also headers can be made to fill the memory."""

    def __init__(self, stream: gzip.GzipFile, limit: int, archive: Path) -> None:
        self.stream, self.limit, self.left, self.archive = stream, limit, limit, archive

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise UserError(
                f"{printable(str(self.archive))}: unsafe archive, refused: it unpacks to more than {self.limit:,} bytes"
            )
        return data


# ---- Disks -----------------------------------------------------------------------------------------------------------


def _check_room(name: str, folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(errno.ENOSPC, f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(folder))


def _refuse_os_error(name: str, folder: Path, error: OSError) -> NoReturn:
    shown = printable(str(folder))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = error.strerror if str(error.strerror).startswith("needs") else "the disk is full"
        raise UserError(
            f"data={name}: no room in {shown}: {why}; nothing half-written was kept\n"
            "make room, or name a folder on another disk with data.root"
        ) from error
    raise UserError(
        f"data={name}: {printable(str(error.filename or folder))}: {error.strerror or error}\n"
        "data.root names another folder to keep the data in"
    ) from error
