"""What computes here: the state of the code, versions of packages, devices."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dpo.utils import ROOT, n_cores

LONGEST_DIFF = 2**20  # bytes
MOST_NAMES = 50  # of untracked files
GIT_SECONDS = 20
COMMIT = "DPO_COMMIT"  # the environment variable that says what an image without .git was built from
OPTIONAL = ("tensorboard", "trackio", "hydra-joblib-launcher", "hydra-submitit-launcher", "hydra-optuna-sweeper")


@dataclass(frozen=True)
class Checkout:
    """The code of a folder. `problem` says why `commit` or `diff` is None. `diff` is that of tracked files from the
    commit; if it is `cut`, its first LONGEST_DIFF bytes. `untracked` are files that git does not ignore, `n_untracked`
    of them, named at most MOST_NAMES. `new_code`: some of them are Python or YAML."""

    commit: str | None = None
    problem: str | None = None
    diff: bytes | None = b""
    cut: bool = False
    untracked: tuple[str, ...] = ()
    n_untracked: int = 0
    new_code: bool = False

    @property
    def dirty(self) -> bool | None:
        """Whether the code is not the commit's; None if that is not known."""
        return True if self.new_code else None if self.diff is None else bool(self.diff)

    def __str__(self) -> str:
        if self.commit is None:
            return f"not known ({self.problem})"
        changes = (
            f", changes not known ({self.problem})" if self.diff is None else ", with changes" if self.diff else ""
        )
        return self.commit[:12] + changes + (", with new files" if self.untracked else "")


@functools.cache  # of the code as this process has loaded it
def checkout(root: Path = ROOT) -> Checkout:
    """Return the state of the code in the folder `root`."""
    try:
        known = _git(root, "ls-files", "--", "dpo/__init__.py").strip()
        if not known:  # a folder of a repository that does not hold it, such as a home directory's
            return _without("the project's folder is no git checkout")
        commit = _git(root, "rev-parse", "HEAD").strip()
        names = _git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    except FileNotFoundError:
        return _without("git is not installed")
    except subprocess.TimeoutExpired:
        return _without(f"git took more than {GIT_SECONDS} s")
    except (OSError, subprocess.CalledProcessError) as error:
        said = [*(getattr(error, "stderr", None) or str(error)).strip().splitlines(), type(error).__name__]
        outside = "not a git repository" in said[0]
        return _without("the project's folder is no git checkout" if outside else f"git: {said[0]}")
    diff, problem = _diff(root)
    cut, new_code = len(diff or b"") > LONGEST_DIFF, any(name.endswith((".py", ".yaml", ".yml")) for name in names)
    kept = diff and diff[:LONGEST_DIFF]
    return Checkout(commit, problem, kept, cut, tuple(names[:MOST_NAMES]), len(names), new_code)


def _without(problem: str) -> Checkout:
    """Return what is known without git: the commit that an image was built from, if it says so."""
    commit = os.environ.get(COMMIT, "").strip()
    return Checkout(commit, f"{problem}; the commit is that of {COMMIT}", None) if commit else Checkout(None, problem)


def _diff(root: Path) -> tuple[bytes | None, str | None]:
    """Return the diff of tracked files from the commit, one byte more than LONGEST_DIFF at most; None and the reason
    if git fails or takes too long."""
    with subprocess.Popen(
        [*_command(root), "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", "--", "."],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    ) as git:
        assert git.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            git.kill()

        timer = threading.Timer(GIT_SECONDS, end)
        timer.start()
        diff = git.stdout.read(LONGEST_DIFF + 1)  # no more of a large file than is kept
        if len(diff) > LONGEST_DIFF:
            git.kill()
        code = git.wait()
        timer.cancel()
    if late.is_set():
        return None, f"git diff took more than {GIT_SECONDS} s"
    if code and len(diff) <= LONGEST_DIFF:
        return None, f"git diff ended with exit status {code}"
    return diff, None


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints. Raise OSError or subprocess.SubprocessError if it fails."""
    how: dict = {"capture_output": True, "text": True, "errors": "replace", "check": True, "timeout": GIT_SECONDS}
    return subprocess.run([*_command(root), *arguments], env=_environment(), **how).stdout


def _command(root: Path) -> list[str]:
    return ["git", "-C", str(root), "--no-optional-locks", "-c", "core.quotePath=false"]


def _environment() -> dict[str, str]:
    """Return the environment without what would have git look at another repository, as inside a hook."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {"LC_ALL": "C"}


def packages(requirements: Path = ROOT / "requirements.txt") -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, pinned version, installed version or None) of each package that `requirements` pins."""
    text = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    for name, pinned in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE):
        yield name, pinned, version(name)


def version(name: str) -> str | None:
    """Return a package's installed version; None if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that requirements.txt or OPTIONAL names."""
    names = [*(name for name, _, _ in packages()), *OPTIONAL]
    found = {name: installed for name in names if (installed := version(name)) is not None}
    return {"python": platform.python_version(), **found}


def devices(cuda: bool = True, free: bool = False) -> Iterator[str]:
    """Yield a line about each device of this machine that models can train on. `free`: with its free memory. That opens
    each GPU, which takes memory until the process ends."""
    import psutil
    import torch

    for i in range(torch.cuda.device_count() if cuda else 0):
        facts = torch.cuda.get_device_properties(i)
        left = f", {torch.cuda.mem_get_info(i)[0] / 2**30:.1f} free" if free else ""
        capability = f"compute capability {facts.major}.{facts.minor}"
        yield f"GPU {i}: {facts.name}, {facts.total_memory / 2**30:.1f} GiB{left}, {capability}"
    if torch.backends.mps.is_available():
        yield "Apple GPU"
    memory = psutil.virtual_memory()
    left = f", {memory.available / 2**30:.1f} free" if free else ""
    yield f"CPU: {n_cores()} cores ({_cpu()}), {memory.total / 2**30:.1f} GiB{left}"


def _cpu() -> str:
    """Return the processor's name, or its architecture."""
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8", errors="replace") if described.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_energy(numbers: Sequence[int]) -> float | None:
    """Return the joules that CUDA's devices of these `numbers` have used since their driver was loaded, whoever used
    them. None if that is not known: it takes the package nvidia-ml-py and GPUs that count (since Volta)."""
    if not numbers or find_spec("pynvml") is None:
        return None
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        names = [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in numbers]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
    except (pynvml.NVMLError, AttributeError, RuntimeError, AssertionError):  # no such counter, or not NVIDIA's
        return None
