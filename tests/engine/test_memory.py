"""Free memory within control groups of both versions, with files as the kernel has them, and huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharegpt4v.engine import memory
from sharegpt4v.engine.memory import use_huge_pages
from sharegpt4v.engine.slots import free_bytes
from tests.commands import environment

GB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder for groups on a machine with 64 GiB available."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    available = f"MemTotal: {96 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {64 * 2**20} kB\n"
    (tmp_path / "proc" / "meminfo").write_text(available)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def in_group(machine: Path, *lines: str) -> None:
    (machine.parent / "proc" / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))


def group_2(folder: Path, limit: int | str, used: int, inactive: int = 0, active: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = f"anon 1\nfile {inactive + active}\ninactive_file {inactive}\nactive_file {active}\n"
    (folder / "memory.stat").write_text(stat + "workingset_refault_file 7\n")


def group_1(folder: Path, limit: int, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"cache 3\ninactive_file 1\ntotal_inactive_file {cache - 5}\ntotal_active_file 5\n"
    (folder / "memory.stat").write_text(stat)


def test_page_cache_of_a_container_is_free(machine: Path) -> None:
    """8 GiB with 7 GiB of files that were read left 4,096 bytes."""
    in_group(machine, "0::/")
    group_2(machine, 8 * GB, 8 * GB - 4096, inactive=6 * GB, active=GB)
    assert free_bytes(torch.device("cpu")) == 7 * GB + 4096


def test_a_container_of_version_1_is_read(machine: Path) -> None:
    """Docker without a namespace of groups: the path is the host's, and the root is the container's own."""
    in_group(machine, "9:name=systemd:/docker/0a", "4:memory:/docker/0a", "1:cpu,cpuacct:/docker/0a")
    group_1(machine / "memory", 8 * GB, 6 * GB, cache=GB)
    assert free_bytes(torch.device("cpu")) == 3 * GB


def test_limits_of_the_groups_around_hold_too(machine: Path) -> None:
    in_group(machine, "0::/slurm/job_7/step_0")
    group_2(machine / "slurm" / "job_7" / "step_0", "max", GB)
    group_2(machine / "slurm" / "job_7", 16 * GB, 2 * GB)
    group_2(machine / "slurm", 32 * GB, 4 * GB)
    assert free_bytes(torch.device("cpu")) == 14 * GB


def test_groups_of_both_versions_at_once(machine: Path) -> None:
    in_group(machine, "4:memory:/job", "0::/job")
    (machine / "unified" / "job").mkdir(parents=True)
    group_1(machine / "memory" / "job", 9 * GB, GB, cache=10)
    group_1(machine / "memory", 2**63 - 4096, 50 * GB, cache=10)
    assert free_bytes(torch.device("cpu")) == 8 * GB + 10


@pytest.mark.parametrize("lines", [(), ("0::/",), ("0::/gone", "3:memory:/gone")])
def test_without_limits_it_is_what_the_machine_has(lines: tuple[str, ...], machine: Path) -> None:
    if lines:
        in_group(machine, *lines)
    assert free_bytes(torch.device("cpu")) == 64 * GB


def test_a_group_over_its_limit_has_nothing_free(machine: Path) -> None:
    in_group(machine, "0::/")
    group_2(machine, GB, 2 * GB)
    assert free_bytes(torch.device("cpu")) == 0


def test_this_machine_has_memory_free() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 2**50


def test_huge_pages_are_asked_for_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("0", "0"), (None, "1")):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
        if given is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        use_huge_pages()
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


def test_an_engine_asks_for_them_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "from sharegpt4v.engine import build\n"
        "assert 'torch' not in sys.modules and 'THP_MEM_ALLOC_ENABLE' not in os.environ\n"
        "build.build_engine(build.EngineSpec('fake', 'fake@0')).close()\n"
        "print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    env = {name: value for name, value in environment().items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
