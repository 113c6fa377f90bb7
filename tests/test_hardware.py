"""What the machine is taken for, on machines that aren't this one: their answers are put in by hand."""

import platform
from pathlib import Path

import pytest

from engine import hardware

CPUINFO = """processor : 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu sse avx2 avx512f avx512_bf16 rdtscp
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set up a machine: answers of commands by their first words, contents of files by path."""

    def put(system: str = "Linux", arch: str = "x86_64", commands: dict | None = None, files: dict | None = None):
        cards = [Path(file) for file in files or {} if file.endswith("information")]

        def output(*command: str) -> str:
            line = " ".join(command)
            return next((answer for start, answer in (commands or {}).items() if line.startswith(start)), "")

        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(platform, "machine", lambda: arch)
        monkeypatch.setattr(hardware, "_output", output)
        monkeypatch.setattr(hardware, "_read", lambda path: (files or {}).get(str(path), ""))
        monkeypatch.setattr(Path, "glob", lambda self, pattern: cards)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def test_this_machine_gives_a_complete_answer() -> None:
    found = hardware.detect()
    assert found.kind in ("cpu", "cuda", "mps")
    assert found.name and found.cores >= 1
    assert found.memory_bytes > hardware.GIB / 2
    assert found.reason.startswith(f"{found.kind}: ")


def test_a_cpu_names_its_instruction_sets_and_the_missing_driver(machine) -> None:
    machine(files={"/proc/cpuinfo": CPUINFO})
    found = hardware.detect()
    assert (found.kind, found.name) == ("cpu", "AMD EPYC 9R14")
    assert found.features == {"avx2", "avx512f", "avx512_bf16"}
    assert "avx512_bf16" in found.reason and "no NVIDIA driver" in found.reason


def test_an_nvidia_card_wins_and_its_memory_counts(machine) -> None:
    machine(commands={"nvidia-smi --id=0": "NVIDIA H200, 143771, 142900, 9.0"}, files={"/proc/cpuinfo": CPUINFO})
    found = hardware.detect()
    assert (found.kind, found.name, found.memory_bytes) == ("cuda", "NVIDIA H200", 143771 << 20)
    assert found.reason == "cuda: NVIDIA H200, 140 GiB free of 140, compute 9.0"
    assert "avx512_bf16" in found.features  # the CPU's own, still there for the page and for decisions


def test_cuda_visible_devices_is_obeyed(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(commands={"nvidia-smi --id=0": "Big, 1000, 1000, 9.0", "nvidia-smi --id=1": "Small, 500, 500, 8.6"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert hardware.detect().name == "Small"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = hardware.detect()
    assert found.kind == "cpu" and "CUDA_VISIBLE_DEVICES is ''" in found.reason


@pytest.mark.parametrize("answer", ["", "No devices were found", "NVIDIA H200, [N/A], [N/A], 9.0", "a, b"])
def test_a_driver_that_talks_nonsense_is_no_card(machine, answer: str) -> None:
    machine(commands={"nvidia-smi": answer})
    assert hardware.detect().kind == "cpu"


def test_a_driver_without_nvidia_smi_is_still_a_card(machine) -> None:
    machine(files={"/proc/driver/nvidia/gpus/0000:00:05.0/information": "Model: \t\t NVIDIA A10\nIRQ: 10"})
    found = hardware.detect()
    assert (found.kind, found.name, found.memory_bytes) == ("cuda", "NVIDIA A10", 0)
    assert "memory unknown" in found.reason


def test_apple_silicon_and_rosetta(machine) -> None:
    answers = {"sysctl -n machdep.cpu.brand_string": "Apple M4 Pro", "sysctl -n hw.memsize": str(24 << 30)}
    machine("Darwin", "arm64", {**answers, "sysctl -n hw.optional.arm.FEAT_BF16": "1"})
    found = hardware.detect()
    assert (found.kind, found.name, found.memory_bytes) == ("mps", "Apple M4 Pro", 24 << 30)
    assert found.features == {"bf16"}
    machine("Darwin", "x86_64", {**answers, "sysctl -n sysctl.proc_translated": "1"})
    found = hardware.detect()
    assert found.kind == "cpu" and "Rosetta" in found.reason
    machine("Darwin", "x86_64", {"sysctl -n machdep.cpu.brand_string": "Intel Core i7"})
    found = hardware.detect()
    assert found.kind == "cpu" and "an Intel Mac, whose GPU MLX cannot use" in found.reason


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_containers_quota_cuts_the_cores(machine, monkeypatch, files: dict, cores: int) -> None:
    machine(files=files)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert hardware.detect().cores == cores


def test_processors_that_share_a_core_count_once(machine, monkeypatch) -> None:
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    machine(files={siblings.format(n): f"{n % 4},{n % 4 + 4}" for n in range(8)})
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6}, raising=False)
    assert hardware.detect().cores == 3


def test_a_containers_limit_cuts_the_memory(machine) -> None:
    machine(files={"/sys/fs/cgroup/memory.max": str(128 << 20)})
    assert hardware.detect().memory_bytes == 128 << 20
    machine(files={"/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})  # v1's way to say: no limit
    assert 0 < hardware.detect().memory_bytes < 1 << 50


def test_a_missing_or_failing_command_answers_nothing() -> None:
    assert hardware._output("no-such-command-anywhere") == ""
    assert hardware._output("false") == ""


def test_memory_that_is_left_counts_the_file_cache_and_the_container(machine) -> None:
    machine(files={"/proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:   8000 kB\n"})
    assert hardware.available_bytes() == 8000 * 1024
    group = {"/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "4000",
             "/sys/fs/cgroup/memory.stat": "anon 1000\nfile 3000\n", "/proc/meminfo": "MemAvailable: 8000 kB"}
    machine(files=group)
    assert hardware.available_bytes() == 4000
    machine(files=group | {"/sys/fs/cgroup/memory.max": "max"})
    assert hardware.available_bytes() == 8000 * 1024
    machine()
    assert hardware.available_bytes() == 0


def test_resident_memory_of_a_process(machine) -> None:
    machine(files={"/proc/7/status": "VmHWM:\t    300 kB\nVmRSS:\t    200 kB\n"})
    assert hardware.resident_bytes(7) == 200 * 1024
    assert hardware.resident_bytes(7, "VmHWM") == 300 * 1024
    assert hardware.resident_bytes(8) == 0
