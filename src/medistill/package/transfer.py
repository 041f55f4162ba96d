"""Packages on their way: to and from registries of containers (OCI), and wherever fsspec goes."""

import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

from ..errors import DataError, PackageRefused, RunRefused, UsageError, extra
from ..records import Json, refuse_existing, write_atomic
from .archive import MOST_BYTES, MOST_JSON, MOST_TEXT, archived, extracted, read_files, whole
from .strict import parsed

OCI = "oci:"
KNOCK_S, ANSWER_S = 10.0, 30.0
TALK_S = 60.0  # of questions to a registry, before which the last one has to begin
SENT_S = 600.0  # of a package on its way
LAYER = "application/vnd.medistill.package.v1+zip"
MOST = MOST_BYTES + MOST_TEXT
TITLE = "package.medistill"
NOT_FOUND = 404


def push(path: Path, target: str, *, insecure: bool = False) -> str:
    """Send a package to `oci:HOST/NAME:TAG`, to a URL that fsspec knows, or to a path.

    A folder travels as its archive. Returns the SHA-256 of what was sent. `insecure` speaks plain
    HTTP with a registry.
    Raises: PackageRefused when it is no package; RunRefused when the target takes it not.
    """
    content = archived(whole(read_files(path)))
    digest = hashlib.sha256(content).hexdigest()
    if target.startswith(OCI):
        _push_oci(content, target.removeprefix(OCI), insecure)
    elif _is_local(target):
        place = _local(target)
        refuse_existing(place)
        write_atomic(place, content)
    else:
        try:
            _write_there(content, target)
        except (UsageError, RunRefused):
            raise
        except Exception as error:  # of any of fsspec's many file systems
            raise RunRefused(
                f"could not write to {target} ({_first_line(error)}); expected one that takes it"
            ) from None
    return digest


def _write_there(content: bytes, target: str) -> None:
    """Write to where fsspec leads, under the name only once whole, and over nothing.

    Raises: RunRefused when something is there already.
    """
    system, place = extra("fsspec.core", "share").url_to_fs(target)
    if system.exists(place):
        raise RunRefused(f"found {target} already there; expected a new name: choose another")
    half = f"{place}.part"
    try:
        with system.open(half, "wb") as file:
            file.write(content)
        system.mv(half, place)
    finally:
        if system.exists(half):
            system.rm(half)


def pulled(source: str, *, insecure: bool = False) -> bytes:
    """Return the archive of a package from where `push` sends, never more bytes than one has.

    It is not checked here: give it to `extracted` and `examined`, which `pull` of the command line
    does before it writes anything.
    Raises: DataError when there is none; PackageRefused when it is too large or another thing.
    """
    if source.startswith(OCI):
        return _pull_oci(source.removeprefix(OCI), insecure)
    try:
        if _is_local(source):
            if not _local(source).is_file():  # nor is a pipe waited for
                raise DataError(f"found no file {source}; expected a package")
            with _local(source).open("rb") as file:
                _check_size(os.fstat(file.fileno()).st_size)
                content = file.read(MOST + 1)
        else:
            with extra("fsspec", "share").open(source, "rb") as file:
                content = bytes(file.read(MOST + 1))
    except (UsageError, DataError, PackageRefused):
        raise
    except Exception as error:  # of any of fsspec's many file systems
        raise DataError(
            f"could not read {source} ({_first_line(error)}); expected a package there"
        ) from None
    return _small(content)


def _small(content: bytes) -> bytes:
    _check_size(len(content))
    return content


def _check_size(size: int) -> None:
    if size > MOST:
        raise PackageRefused(f"found more than {MOST:,} bytes; expected a package")


def _is_local(target: str) -> bool:
    if target.startswith("file:") and not target.startswith("file://"):
        raise UsageError(f"found {target}; expected file://..., or a path")
    return "://" not in target or target.startswith("file://")


def _local(target: str) -> Path:
    return Path(target.removeprefix("file://"))


def _client(name: str, insecure: bool, most: float = TALK_S) -> tuple[Any, str]:
    host = name.partition("/")[0]
    if "/" not in name or not host:
        raise UsageError(f"found oci:{name}; expected oci:HOST/NAME:TAG")
    _knock(host, insecure)
    client = extra("oras.client", "share").OrasClient(hostname=host, insecure=insecure)
    end = time.monotonic() + most
    client.session.request = partial(_request, client.session.request, end, most)
    # Without this it would ask again for two minutes whatever the answer.
    once = getattr(type(client).do_request, "__wrapped__", type(client).do_request)
    client.do_request = partial(once, client)
    return client, name


def _request(ask: Callable[..., Any], end: float, most: float, *args: Any, **kwargs: Any) -> Any:
    """Ask a registry within bounds of time: the client sets none.

    Raises: TimeoutError.
    """
    if time.monotonic() > end:
        raise TimeoutError(f"no whole answer in {most:.0f} s")
    return ask(*args, **{**kwargs, "timeout": (KNOCK_S, ANSWER_S)})


def _knock(host: str, insecure: bool) -> None:
    """Ask whether anybody is there: the client itself would try for minutes.

    Behind a proxy only that can tell.
    Raises: DataError.
    """
    place, _, port = host.partition(":")
    if getproxies() and not proxy_bypass(place):
        return
    try:
        number = int(port or (80 if insecure else 443))
        socket.create_connection((place, number), timeout=KNOCK_S).close()
    except (OSError, ValueError) as error:
        raise DataError(
            f"could not reach the registry {host} ({_first_line(error)}); expected another"
        ) from None


def _push_oci(content: bytes, name: str, insecure: bool) -> None:
    client, target = _client(name, insecure, SENT_S)  # questions follow the package on its way
    extracted(content)
    if _is_there(client, target):
        raise RunRefused(f"found oci:{name} already there; expected a new name or tag: choose one")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / TITLE
        place.write_bytes(content)
        try:
            client.push(
                target, files=[f"{place}:{LAYER}"], disable_path_validation=True, quiet=True
            )
        except Exception as error:  # of oras, of requests and of the registry
            raise RunRefused(
                f"{name} did not take the package ({_first_line(error)}); expected a registry that "
                "is there and lets you write"
            ) from None


def _is_there(client: Any, target: str) -> bool:
    """Say whether a registry has a manifest of this name and tag, which a push would replace."""
    try:
        _manifest(client, target)
    except PackageRefused:
        return True  # another thing than ours
    except Exception as error:  # of oras, of requests and of what a registry may answer
        if getattr(getattr(error, "response", None), "status_code", None) == NOT_FOUND:
            return False
        raise RunRefused(
            f"oci:{target} did not say whether it is there ({_first_line(error)}); expected a "
            "registry that is there and lets you write"
        ) from None
    return True


def _pull_oci(name: str, insecure: bool) -> bytes:
    """Take the one layer of a manifest, by its digest, in parts; titles in it are not looked at."""
    client, target = _client(name, insecure)
    try:
        manifest = _manifest(client, target)
        layers = [one for one in manifest.get("layers", []) if one.get("mediaType") == LAYER]
        if len(layers) != 1 or int(layers[0]["size"]) > MOST:
            raise PackageRefused(f"found no package, or too large a one, in {name}; expected one")
        digest = str(layers[0]["digest"])
        with client.get_blob(client.get_container(target), digest, stream=True) as response:
            response.raise_for_status()
            content = _small(_begun(response.iter_content(1 << 20), MOST))
    except PackageRefused:
        raise
    except Exception as error:  # of oras, of requests and of what a registry may answer
        raise DataError(
            f"could not read {name} ({_first_line(error)}); expected a package in a registry"
        ) from None
    if digest != f"sha256:{hashlib.sha256(content).hexdigest()}":
        raise PackageRefused(f"found other bytes in {name} than its digest says; get it again")
    return content


def _manifest(client: Any, target: str) -> Json:
    """Return the manifest of a target, of which no more than its most is ever read."""
    container = client.get_container(target)
    client.auth.load_configs(container)
    address = f"{client.prefix}://{container.manifest_url()}"
    headers = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    with client.do_request(address, "GET", headers=headers, stream=True) as response:
        response.raise_for_status()
        content = _begun(response.iter_content(1 << 16), MOST_JSON)
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if container.digest and container.digest != found:
        raise PackageRefused(f"found the manifest {found} for {target}; expected the one asked for")
    return parsed(content, "the registry's manifest", MOST_JSON)


def _begun(parts: Iterable[bytes], most: int) -> bytes:
    """Return what parts hold, up to the one in which they become more than the most."""
    found, began = bytearray(), time.monotonic()
    for part in parts:
        found += part
        if time.monotonic() - began > SENT_S:
            raise TimeoutError(f"no whole answer in {SENT_S:.0f} s")
        if len(found) > most:
            break
    return bytes(found)


def _first_line(error: Exception) -> str:
    return ascii(str(error).partition("\n")[0])[1:-1][:200]
