"""What this machine can compute on, found out without importing torch or mlx, in a few milliseconds.

Knows nothing of models: which backend and number format follow from it is `plan`'s decision. Every question has a
fallback, so that `detect` never fails: what can't be read is left out of the sentence.
"""

import ctypes
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEATURES = frozenset(
    {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"}
    | {"asimd", "asimddp", "bf16", "i8mm", "sve"}
)
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Hardware:
    """`kind` is 'cpu', 'cuda' or 'mps'; `name` the processor's or card's own name.

    `memory_bytes` is the memory a model would live in: the card's on 'cuda', the machine's (or the container's limit)
    elsewhere, 0 where nobody says. `cores` are the physical CPU cores this process may use, `features` the CPU's of
    `FEATURES`.
    """

    kind: str
    name: str
    memory_bytes: int
    cores: int
    features: frozenset[str]
    reason: str


def detect() -> Hardware:
    """Look at the machine: an NVIDIA card first, then Apple Silicon, else the CPU."""
    cores, features = _cores(), _cpu_features()
    card, no_card = _nvidia()
    if card is not None:
        name, memory, detail = card
        return Hardware("cuda", name, memory, cores, features, f"cuda: {name}{detail}")
    name, memory = _cpu_name(), _memory()
    about = f"{name}, {cores} core{'s' if cores != 1 else ''}"
    if memory:
        about += f", {memory / GIB:.1f} GiB memory"
    if platform.system() == "Darwin":
        if platform.machine() == "arm64":
            return Hardware("mps", name, memory, cores, features, f"mps: {about}, Apple Silicon")
        if _sysctl("sysctl.proc_translated") == "1":
            about += "; this Python runs under Rosetta: install an arm64 Python to use the Apple GPU"
        else:
            about += "; an Intel Mac, whose GPU MLX cannot use"
    known = " ".join(sorted(features & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"}))
    return Hardware("cpu", name, memory, cores, features, f"cpu: {about}{', ' + known if known else ''}; {no_card}")


def _nvidia() -> tuple[tuple[str, int, str] | None, str]:
    """((name, memory in bytes, ", 139 GiB free, compute 9.0"), "") of the first visible card, or (None, why not)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None, f"no NVIDIA card used: CUDA_VISIBLE_DEVICES is {visible!r}"
    first = visible.split(",")[0].strip() if visible else "0"
    fields = "name,memory.total,memory.free,compute_cap"
    answer = _output("nvidia-smi", f"--id={first}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    cells = [cell.strip() for cell in answer.splitlines()[0].split(",")] if answer else []
    if len(cells) == 4 and cells[1].isdigit():
        name, total, free, compute = cells
        return (name, int(total) << 20, f", {_gib(free)} GiB free of {_gib(total)}, compute {compute}"), ""
    # Containers sometimes hand in the driver without nvidia-smi: the kernel's own page still names the card.
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if model := re.search(r"^Model:\s*(.+)$", _read(information), re.MULTILINE):
            return (model[1].strip(), 0, ", nvidia-smi does not answer, memory unknown"), ""
    return None, "no NVIDIA driver"


def _gib(mebibytes: str) -> str:
    return f"{int(mebibytes) / 1024:.0f}" if mebibytes.isdigit() else "unknown"


def _cores() -> int:
    """Cores this process may use: the affinity mask, cut by a container's quota (cgroup v2, then v1). Processors that
    share a core, where Linux says which, count once: they share what multiplies too."""
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        allowed = len({_read(Path(topology.format(each))) or each for each in os.sched_getaffinity(0)})
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if not quota:
        quota = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
        period = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def _memory() -> int:
    """Bytes of memory, cut by a container's limit; 0 where the system doesn't say."""
    if platform.system() == "Darwin":
        answer = _sysctl("hw.memsize")
        return int(answer) if answer.isdigit() else 0
    if platform.system() == "Windows":
        return _windows_memory()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
    limits = [_read(Path("/sys/fs/cgroup/memory.max")), _read(Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def available_bytes() -> int:
    """Bytes of main memory that a program could take now without pushing another out; 0 where the system doesn't say.

    File cache counts as available. In a container, what its limit leaves, since nobody else can use that.
    """
    if platform.system() == "Windows":
        return _windows_memory(available=True)
    if not (free := re.search(r"^MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)):
        return 0
    rooms = [int(free[1]) * 1024]
    limit, used = (_read(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        cache = re.search(r"^file (\d+)", _read(Path("/sys/fs/cgroup/memory.stat")), re.MULTILINE)
        rooms.append(int(limit) - int(used) + (int(cache[1]) if cache else 0))
    return max(1, min(rooms))


def resident_bytes(pid: int | str = "self", field: str = "VmRSS") -> int:
    """Bytes of a process that lie in memory, mapped pages of files included; with field VmHWM, the most there ever
    were. 0 where the system doesn't say (only Linux does) or the process is gone."""
    status = re.search(rf"^{field}:\s*(\d+) kB", _read(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(status[1]) * 1024 if status else 0


def _windows_memory(available: bool = False) -> int:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load_percent", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("others", ctypes.c_ulonglong * 5),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    known = _kernel32().GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.available if available else status.total) if known else 0


def _kernel32() -> Any:
    """Windows' own library, which exists there alone (hence the detour around the type checker)."""
    return vars(ctypes)["windll"].kernel32


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    if named := re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE):
        return named[1].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _cpu_features() -> frozenset[str]:
    """The CPU's instruction sets, as Linux spells them, of those that matter to a matrix product."""
    if platform.system() == "Darwin":
        if platform.machine() == "arm64":
            names = {"asimd": "AdvSIMD", "bf16": "FEAT_BF16", "i8mm": "FEAT_I8MM", "asimddp": "FEAT_DotProd"}
            return frozenset(ours for ours, theirs in names.items() if _sysctl(f"hw.optional.arm.{theirs}") == "1")
        return frozenset(_sysctl("machdep.cpu.leaf7_features").lower().split()) & FEATURES
    if platform.system() == "Windows":
        present = _kernel32().IsProcessorFeaturePresent
        return frozenset(name for name, number in {"avx2": 40, "avx512f": 41}.items() if present(number))
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return frozenset(flags[1].split()) & FEATURES if flags else frozenset()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    return _output("sysctl", "-n", name)


def _output(*command: str) -> str:
    """What a command prints, "" when it is missing, fails or takes more than 10 s (a hung driver must not hang us)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
