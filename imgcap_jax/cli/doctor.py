"""``imgcap doctor``: what is here, what works, what is missing, and what to type next.

Nothing is downloaded, and nothing is compiled except one addition.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

import imgcap_jax
from imgcap_jax.errors import UserError, counted
from imgcap_jax.files import cache_folder, is_private, reason

_SECONDS_FOR_DEVICES = 30.0
_FEW_BYTES = 2_000_000_000  # of free disk
_SHOWN_RUNS = 8
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "array_record", "numpy")
_EXTRAS: dict[str, tuple[str, str, str]] = {
    "meteor": ("pycocoevalcap", "METEOR", "pip install pycocoevalcap"),
    "tensorboard": ("tensorboard", "curves of training", "pip install tensorboard"),
    "torch": ("torch", "comparisons with PyTorch", "pip install torch"),
    "tpu-plan": ("libtpu", "imgcap plan for TPU", 'pip install -c constraints.txt "jax[tpu]"'),
    "gcs": ("gcsfs", "runs and datasets in gs:// folders", "pip install gcsfs"),
    "exif": ("pyexiv2", "imgcap caption --write-exif", "pip install pyexiv2"),
    "export": ("flatbuffers", "imgcap export to .imgcap files", "pip install flatbuffers"),
    "onnx": ("jax2onnx", "imgcap export to .onnx files", "see docs/sharing.md"),
    "hub": ("huggingface_hub", "imgcap push and pull", "pip install huggingface_hub"),
    "web": ("fastapi", "imgcap serve", "pip install fastapi uvicorn prometheus-client"),
}
"""Extra -> (its module, what it is for, how to install it)."""
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "IMGCAP_CACHE", "TFDS_DATA_DIR")
_PREFIXES = ("JAX_", "NCCL_", "CUDA_VISIBLE", "XLA_PYTHON_CLIENT")
_CLUSTERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}  # the number of processes


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: "problem" if training, evaluating or captioning does not work because of it; "note" if something is
            slower or left out.
        advice: what to do; "" if nothing.
    """

    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""


@dataclass
class Report:
    """sections: title -> its findings. next: the command to type next."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)
    next: str = ""

    @property
    def problems(self) -> list[Finding]:
        """The findings because of which the main job does not work."""
        return [one for section in self.sections.values() for one in section if one.state == "problem"]

    def lines(self) -> list[str]:
        """The report for a terminal."""
        width = max(len(one.name) for section in self.sections.values() for one in section)
        lines = []
        for title, findings in self.sections.items():
            lines.append(title)
            for one in findings:
                mark = {"ok": " ", "note": "-", "problem": "!"}[one.state]
                lines.append(f"{mark} {one.name.ljust(width)}  {one.value}".rstrip())
                lines += [f"  {' ' * width}  {one.advice}"] if one.advice else []
            lines.append("")
        count = len(self.problems)
        ended = "training, evaluating and captioning work here"
        if count:
            ended = f"{counted(count, 'problem')}, marked with !: {', '.join(one.name for one in self.problems)}"
        return [*lines, ended, f"next: {self.next}"]

    def json(self) -> str:
        """The report as JSON."""
        sections = {title: [asdict(one) for one in findings] for title, findings in self.sections.items()}
        return json.dumps({"ok": not self.problems, "next": self.next, "sections": sections}, indent=2)


def doctor(*, data_dir: Path | None, as_json: bool) -> int:
    """Prints the report; returns 0, or 1 if something that the main job needs is missing."""
    report = examine(data_dir)
    print(report.json() if as_json else "\n".join(report.lines()))
    return int(bool(report.problems))


def examine(data_dir: Path | None = None) -> Report:
    """Looks at everything. The folder of runs is that of the current folder.

    Args:
        data_dir: the folder of datasets; None: the default one.
    """
    report = Report()
    report.sections["Python and packages"] = _examined("packages", _packages)
    report.sections["devices"] = _examined("devices", _devices)
    report.sections["folders"] = _examined("folders", _folders)
    names: list[str] = []
    report.sections["datasets"] = _examined("datasets", lambda: _datasets(data_dir, names))
    runs: list[str] = []
    report.sections["runs"] = _examined("runs", lambda: _runs(runs))
    report.sections["extras"] = _examined("extras", _extras)
    if settings := list(_settings()):
        report.sections["settings"] = settings
    broken = next((one.advice for one in report.problems if one.advice), "")
    report.next = broken or _next(names, runs)
    return report


def _examined(name: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings. An error of a broken installation, of any kind, is one of them."""
    found = []
    try:
        for one in look():
            found.append(one)
    except Exception as error:
        advice = "install imgcap_jax again: pip install -c constraints.txt -e ."
        found.append(Finding(name, f"{type(error).__name__}: {reason(error)}", "problem", advice))
    return found


def _next(datasets: list[str], runs: list[str]) -> str:
    """The command to type next, if there is no problem."""
    from imgcap_jax.cli.experiments import shipped_names

    if runs:
        return f"imgcap evaluate {runs[0]} --split val --beam 3"
    known = [name for name in datasets if name in shipped_names()]
    if known:
        return f"imgcap train {known[0]} --smoke"
    return "imgcap data inspect " + datasets[0] if datasets else "imgcap data prepare scenes"


def _packages() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.system()} {platform.machine()}, {counted(cores or 1, 'core')}, {_size(memory)} of memory"
    yield Finding("imgcap_jax", f"{imgcap_jax.__version__} in {Path(imgcap_jax.__file__).parent}")
    yield Finding("Python", f"{platform.python_version()}, {machine}")
    tested, required = _tested(), _required()
    for name in dict.fromkeys((*_PACKAGES, *required)):
        requirement = required.get(name)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if requirement is not None or name in _PACKAGES:
                yield Finding(name, "missing", "problem", f"pip install {_quoted(requirement or Requirement(name))}")
            continue
        if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
            advice = f"needs {requirement.specifier}: pip install {_quoted(requirement)}"
            yield Finding(name, version, "problem", advice)
        elif tested.get(name.lower(), version) != version and name in _PACKAGES:
            yield Finding(name, f"{version} (tested: {tested[name.lower()]})", "note")
        elif name in _PACKAGES:
            yield Finding(name, version)


def _quoted(requirement: Requirement) -> str:
    return f'"{requirement.name}{requirement.specifier}"' if requirement.specifier else requirement.name


def _required() -> dict[str, Requirement]:
    """The requirements of the package by name; none if it was not installed."""
    try:
        lines = importlib.metadata.requires("imgcap_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        one.name: one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def _tested() -> dict[str, str]:
    """The tested version of each package, which a clone has in constraints.txt."""
    path = Path(imgcap_jax.__file__).parent.parent / "constraints.txt"
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "==" in line and line[0] != "#"]
    pins = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    return {one.name.lower(): next(iter(one.specifier)).version for one in pins}


def _devices() -> Iterator[Finding]:
    found = _within(_SECONDS_FOR_DEVICES, _ask_devices)
    if found is None:
        advice = "on a slice of several hosts, run the same command on all of them at once"
        yield Finding("devices", f"no answer within {_SECONDS_FOR_DEVICES:.0f} s", "problem", advice)
        return
    if isinstance(found, BaseException):
        yield Finding("devices", reason(found), "problem", "JAX_PLATFORMS=cpu imgcap doctor")
        return
    yield from found
    yield from _unused_accelerators(found[0].value)


def _ask_devices() -> list[Finding]:
    import jax

    from imgcap_jax.experiment import Training
    from imgcap_jax.precision import compute_dtype
    from imgcap_jax.training.parallel import DataParallel

    kinds = ", ".join(dict.fromkeys(device.device_kind for device in jax.devices()))
    count, hosts = len(jax.devices()), jax.process_count()
    result = [Finding("platform", jax.default_backend())]
    result.append(Finding("devices", f"{count} x {kinds}" + (f" on {hosts} hosts" if hosts > 1 else "")))
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        result.append(Finding("memory of each", _size(stats["bytes_limit"])))
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0
    result.append(Finding("training.dtype", f"auto is {compute_dtype('auto')} here"))
    mode = Training().parallel
    result.append(Finding("training.parallel", f"{mode} is {DataParallel(mode).mode} here" if mode == "auto" else mode))
    return result


def _unused_accelerators(backend: str) -> Iterator[Finding]:
    """Accelerators that the system has and JAX does not use."""
    if backend != "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        yield Finding(
            "NVIDIA GPU", "present, but JAX does not use it", "note", 'pip install -c constraints.txt "jax[cuda12]"'
        )
    if any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists():
        yield Finding(
            "TPU", "perhaps present, but JAX does not use it", "note", 'pip install -c constraints.txt "jax[tpu]"'
        )


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises; None if it takes longer. It then goes on in a thread of its own."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _folders() -> Iterator[Finding]:
    from imgcap_jax.run.folder import RUNS

    yield _writable("runs", RUNS.absolute(), "change to a folder that you can write to, or give --run FOLDER")
    yield from _size_of("features", RUNS.absolute() / ".cache" / "features")
    home = cache_folder("xla").parent
    cache = _writable("cache", home, "IMGCAP_CACHE=FOLDER imgcap doctor, with a FOLDER that you can write to")
    yield cache
    if cache.state == "problem":
        return
    for name, of in (("xla", "compiled programs"), ("weights", "weights"), ("meteor", "METEOR's tables")):
        yield from _size_of(of, home / name)
    if (home / "xla").is_dir() and not is_private(home / "xla"):
        yield Finding(
            "compiled programs", "not kept: others can change the folder", "note", f"chmod 700 {home / 'xla'}"
        )


def _writable(name: str, folder: Path, advice: str) -> Finding:
    """Whether files can be written in a folder, or where it would be made; with the free space of its disk."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(name, f"{folder} cannot be written: {error.strerror}", "problem", advice)
    value = f"{folder}, {_size(free)} free"
    return Finding(name, value, "note", "free some space") if free < _FEW_BYTES else Finding(name, value)


def _size_of(name: str, folder: Path) -> Iterator[Finding]:
    if folder.is_dir():
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        yield Finding(name, f"{_size(sum(sizes))} in {folder}")


def _datasets(data_dir: Path | None, usable: list[str]) -> Iterator[Finding]:
    """The datasets. The names of those that can be used are added to ``usable``."""
    from imgcap_jax.data.catalogue import list_datasets
    from imgcap_jax.data.sources import default_data_dir

    try:
        folder = data_dir or default_data_dir()
        listed = list_datasets(folder)
    except (OSError, UserError) as error:
        yield Finding("folder", reason(error), "problem", "set TFDS_DATA_DIR to a folder that you can read")
        return
    if not listed:
        yield Finding("none", f"in {folder}", "note", "imgcap data prepare scenes, or imgcap data prepare FOLDER")
    for one in listed:
        if one.problem:
            yield Finding(one.name, one.problem, "note")
            continue
        usable.append(one.name)
        yield Finding(one.name, ", ".join(f"{split} {count:,}" for split, count in one.splits.items()))


def _runs(usable: list[str]) -> Iterator[Finding]:
    """The runs, the latest first. The folders of those that have trained parameters are added to ``usable``."""
    from imgcap_jax.run.finder import is_run
    from imgcap_jax.run.folder import RUNS
    from imgcap_jax.training.checkpoints import CHECKPOINTS, latest_step

    folders = [path for path in RUNS.iterdir() if is_run(path)] if RUNS.is_dir() else []
    if not folders:
        yield Finding("none", f"in {RUNS.absolute()}")
    for number, folder in enumerate(sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)):
        newest, best = (latest_step(folder / CHECKPOINTS / kind) for kind in ("newest", "best"))
        if best is not None:
            usable.append(str(folder))
        if number < _SHOWN_RUNS:
            validated = "not validated yet" if best is None else f"best at step {best}"
            yield Finding(folder.name, "no checkpoint" if newest is None else f"step {newest}, {validated}")
    if len(folders) > _SHOWN_RUNS:
        yield Finding("...", f"and {len(folders) - _SHOWN_RUNS} more")


def _extras() -> Iterator[Finding]:
    for extra, (module, purpose, install) in _EXTRAS.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(extra, f"installed ({purpose})")
        else:
            yield Finding(extra, f"missing ({purpose})", "note", install)
    if shutil.which("java") is None:
        yield Finding("java", "missing (SPICE)", "note", "install a Java runtime, such as openjdk-21-jre-headless")
    else:
        yield Finding("java", f"{shutil.which('java')} (SPICE)")


def _settings() -> Iterator[Finding]:
    """Variables that change what JAX does or where files are, and the cluster, if there is one."""
    environment: Mapping[str, str] = os.environ
    for name in sorted(environment):
        if name in _SETTINGS or name.startswith(_PREFIXES):
            yield Finding(name, environment[name])
    for name, cluster in _CLUSTERS.items():
        if environment.get(name, "1") != "1":
            yield Finding(
                cluster, f"{environment[name]} ({name})", "ok", "imgcap train EXPERIMENT --distributed, in each task"
            )
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        yield Finding(
            "TPU slice",
            environment["TPU_WORKER_HOSTNAMES"],
            "ok",
            "imgcap train EXPERIMENT --distributed, on each host",
        )


def _size(count: float) -> str:
    """A number of bytes: "12.3 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
