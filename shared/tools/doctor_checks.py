"""What doctor.py looks at: packages, the machine, the network's settings, data and weights.

Each function gives `Check`s and changes nothing. Standard library only; torch is asked in a process
of its own, and only where there is a GPU that it might not be able to use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from shared.device import driver_version, present_gpus, visible_gpus
from shared.files import open_regular
from shared.tools.about import Need, Recipe

OK, NOTE, MISSING = "ok", "note", "missing"
_PARTS = (".part", ".incomplete", ".aria2", ".crdownload")
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(.*)")
_PATIENCE = 5.0  # seconds for a host to answer


@dataclass(frozen=True)
class Check:
    """One line of the answer. state: ok, note (worth knowing) or missing.

    command: for a shell in the repository's root; advice: what to do else.
    """

    group: str
    name: str
    state: str
    value: str
    advice: str = ""
    command: str = ""


# --- packages -------------------------------------------------------------------------------------


def packages(root: Path, recipes: list[str]) -> Iterator[Check]:
    """Python, the recipes' packages against their floors and the lock, and a broken torchaudio."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("packages", "python", OK, f"{version}, {sys.executable}")
    locked = dict(_requirements(root / "requirements" / "lock.txt"))
    wanted: dict[str, str] = {}
    for recipe in recipes:
        for name, floors in _requirements(root / "requirements" / f"{recipe}.txt"):
            wanted[name] = ",".join(filter(None, (wanted.get(name), floors)))
    for name, floors in sorted(wanted.items()):
        yield _package(name, floors, locked.get(name, "").removeprefix("=="))
    yield from _torchaudio()


def _package(name: str, floors: str, locked: str) -> Check:
    try:
        version = str(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", name, MISSING, "not installed", command="./setup.sh")
    if not _satisfies(version, floors):
        return Check("packages", name, MISSING, f"{version}, needs {floors}", command="./setup.sh")
    if locked and version.partition("+")[0] != locked.partition("+")[0]:
        value = f"{version}; tested with {locked}"
        return Check("packages", name, NOTE, value, command="./setup.sh")
    return Check("packages", name, OK, version)


def _requirements(path: Path) -> Iterator[tuple[str, str]]:
    """Names in lower case with dashes, and their conditions; files named by -r included."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in (line.partition("#")[0].partition(";")[0].strip() for line in lines):
        if line.startswith("-r "):
            yield from _requirements(path.parent / line[3:].strip())
        elif found := (None if line.startswith("-") else _NAME.fullmatch(line)):
            yield re.sub(r"[._]+", "-", found[1]).lower(), found[2].replace(" ", "")


def _satisfies(version: str, conditions: str) -> bool:
    """Whether the version's numbers meet `>=`, `<` and `==`; other conditions are pip's affair."""
    for condition in filter(None, conditions.split(",")):
        for sign, holds in _SIGNS:
            if condition.startswith(sign):
                if not holds(_numbers(version), _numbers(condition[len(sign) :])):
                    return False
                break
    return True


_SIGNS = (
    (">=", lambda have, need: have >= need),
    ("==", lambda have, need: have[: len(need)] == need),
    ("<", lambda have, need: have < need),
)


def _numbers(version: str) -> tuple[int, ...]:
    """2.15.0+cu132 → (2, 15, 0)."""
    return tuple(int(word) for word in re.findall(r"\d+", version.partition("+")[0]))


def _torchaudio() -> Iterator[Check]:
    """A torchaudio that was built for another torch fails to import, and others with it."""
    try:
        have = importlib.metadata.version("torchaudio")
    except importlib.metadata.PackageNotFoundError:
        return
    advice = "nothing here uses it, and others fail to import because of it"
    problem = _last_line_of("import torchaudio")
    if problem:
        value = f"{have} is broken: {problem}"
        yield Check("packages", "torchaudio", MISSING, value, advice, "pip uninstall torchaudio")
    else:
        yield Check("packages", "torchaudio", OK, f"{have}, which nothing here needs")


def _last_line_of(program: str) -> str:
    """What a Python program ends with on stderr when it fails; '' when it does not."""
    command = [sys.executable, "-c", program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return lines[-1][:200] if ended.returncode else ""


# --- the machine ----------------------------------------------------------------------------------


def machine(root: Path, environ: Mapping[str, str]) -> Iterator[Check]:
    """CPU, memory, /dev/shm, disk, GPUs and whether torch can use them, a port."""
    total, free = _memory()
    yield Check("machine", "CPU cores", OK, str(os.cpu_count() or "unknown"))
    yield Check("machine", "memory", OK, f"{_gigabytes(total)}, {_gigabytes(free)} free")
    yield _shared_memory()
    disk = shutil.disk_usage(root)
    state, advice = (NOTE, "free some space") if disk.free < 10**10 else (OK, "")
    yield Check("machine", "disk", state, f"{_gigabytes(disk.free)} free at {root}", advice)
    yield from _gpus(environ)
    yield _port()


def _memory() -> tuple[int, int]:
    """Bytes in all and available."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.M))
    return 1024 * int(found.get("MemTotal", 0)), 1024 * int(found.get("MemAvailable", 0))


def _shared_memory() -> Check:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Check("machine", "/dev/shm", NOTE, "not there", "use --workers 0")
    advice = "a container's default is too small for loader workers: --shm-size 8g, or --workers 0"
    small = size < 10**9
    return Check(
        "machine", "/dev/shm", NOTE if small else OK, _gigabytes(size), advice if small else ""
    )


def _gpus(environ: Mapping[str, str]) -> Iterator[Check]:
    present = present_gpus()
    if not present:
        yield Check("machine", "GPUs", NOTE, "none: everything runs on the CPU")
        return
    visible = visible_gpus(environ, present)
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    told = f", {visible} visible (CUDA_VISIBLE_DEVICES={mask})" if mask is not None else ""
    yield Check("machine", "GPUs", OK if visible else NOTE, f"{present} present{told}")
    yield Check("machine", "NVIDIA driver", OK, driver_version())
    if visible:
        yield _torch_sees_them()


def _torch_sees_them() -> Check:
    problem = _last_line_of(
        "import torch; torch.cuda.init(); "
        "[torch.zeros(1, device=i) for i in range(torch.cuda.device_count())]"
    )
    if not problem:
        return Check("machine", "torch on GPU", OK, "works")
    advice = "update the driver, or install a torch build for it; --device cpu works meanwhile"
    return Check("machine", "torch on GPU", MISSING, problem, advice)


def _port() -> Check:
    """Whether processes of this host can meet on the loopback."""
    try:
        with socket.create_server(("localhost", 0)):
            return Check("machine", "loopback", OK, "processes can meet at localhost")
    except OSError as error:
        advice = "several processes need it: see /etc/hosts and the container's network"
        return Check("machine", "loopback", NOTE, str(error), advice)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# --- the network ----------------------------------------------------------------------------------


def network(environ: Mapping[str, str], online: bool) -> Iterator[Check]:
    """Mirrors, caches and proxies as they are configured; with `online` whether hosts answer."""
    hub = environ.get("HF_ENDPOINT") or "https://huggingface.co"
    other = "https://huggingface.co" if "hf-mirror.com" in hub else "https://hf-mirror.com"
    yield _host("Hugging Face Hub", hub, online, f"another HF_ENDPOINT, as {other}")
    domain = environ.get("MODELSCOPE_DOMAIN")
    named = f"https://{domain}" if domain and "://" not in domain else domain
    scope = environ.get("MODELSCOPE_ENDPOINT") or named or "https://www.modelscope.cn"
    yield _host("ModelScope", scope, online, "another MODELSCOPE_ENDPOINT, or take the Hub")
    yield Check("network", "Hub's cache", OK, str(hub_cache(environ)))
    if environ.get("MODELSCOPE_CACHE"):
        yield Check("network", "ModelScope's cache", OK, environ["MODELSCOPE_CACHE"])
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "USE_HF"):
        if environ.get(name):
            yield Check("network", name, NOTE, environ[name])
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        if environ.get(name):
            yield Check("network", name, OK, without_credentials(environ[name]))


def _host(name: str, address: str, online: bool, otherwise: str) -> Check:
    shown = without_credentials(address)
    if not online:
        return Check("network", name, OK, f"{shown} (asked with --online)")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_PATIENCE):
            return Check("network", name, OK, f"{shown} answers")
    except urllib.error.HTTPError as error:  # an answer all the same
        return Check("network", name, OK, f"{shown} answers ({error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        value = f"{shown} does not answer: {reason}"
        return Check("network", name, NOTE, value, f"check the proxy; or set {otherwise}")


def without_credentials(address: str) -> str:
    """An address without the name and password, and the query, that it may hold."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not an address)"
    if not parts.hostname:
        return "(not an address)"
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"


# --- data and weights -----------------------------------------------------------------------------


def data(root: Path, recipe: Recipe, environ: Mapping[str, str]) -> Iterator[Check]:
    """What of the recipe's weights, data and programs is there."""
    group = f"real data of {recipe.name}"
    for need in (*recipe.weights, *recipe.data):
        yield _need(root, group, need, environ)
    for need in recipe.programs:
        yield _program(group, need)


def _need(root: Path, group: str, need: Need, environ: Mapping[str, str]) -> Check:
    places = [_place(root, path, environ) for path in (need.path, *need.alternatives)]
    for place in places:
        if (found := _first(place)) is not None:
            return Check(group, need.what, OK, _short(found, root))
    value, state = _short(places[0], root), NOTE if need.optional else MISSING
    if any(map(_is_on_its_way, places)):
        value, state = f"{value}: unfinished download", MISSING
    return Check(group, need.what, state, value, need.hint, need.command)


def _program(group: str, need: Need) -> Check:
    """A program, or a package in its place; without it a part of the data cannot be had: a note."""
    name = f"{need.name}, for {need.what}"
    for found in (need.name, *need.alternatives):
        if shutil.which(found) or importlib.util.find_spec(found):
            return Check(group, name, OK, found)
    return Check(group, name, NOTE, "not found", need.hint, need.command)


def _place(root: Path, path: str, environ: Mapping[str, str]) -> Path:
    torch = environ.get("TORCH_HOME") or _cache(environ) / "torch"
    path = path.format(hub=hub_cache(environ), torch=Path(torch) / "hub")
    return root / path  # one that begins at a cache stays as it is


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where the Hugging Face Hub's files are kept."""
    own = environ.get("HF_HUB_CACHE") or environ.get("TRANSFORMERS_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    home = environ.get("HF_HOME") or _cache(environ) / "huggingface"
    return Path(home).expanduser().absolute() / "hub"


def _cache(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _first(pattern: Path) -> Path | None:
    """The first file of a pattern that holds something, and is no pointer to what it should."""
    text = str(pattern)
    if not any(sign in text for sign in "*?["):
        return pattern if _is_there(pattern) else None
    fixed = next(p for p in pattern.parents if not any(sign in str(p) for sign in "*?["))
    try:
        found = fixed.glob(str(pattern.relative_to(fixed)))
        return next((p for p in found if p.suffix not in _PARTS and _is_there(p)), None)
    except OSError:
        return None


def _is_there(path: Path) -> bool:
    try:
        if path.is_dir():
            return any(path.iterdir())
        with open_regular(path) as stream:
            start = stream.read(24)
    except OSError:
        return False
    return bool(start) and not start.startswith(b"version https://git-lfs")


def _is_on_its_way(place: Path) -> bool:
    """Whether a download has begun where the file will be."""
    try:
        return any(path.suffix in _PARTS for path in place.parent.iterdir())
    except OSError:
        return False


def _short(path: Path, root: Path) -> str:
    """`path` below the repository, or below the home directory as ~."""
    for base, prefix in ((root, ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return prefix + str(path.relative_to(base))
    return str(path)
