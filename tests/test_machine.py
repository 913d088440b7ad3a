"""What `lightship doctor` finds, and what it makes of it."""

import json

import pytest

from lightship.machine import (
    advice,
    cpu_quota,
    examine,
    memory_available,
    memory_bandwidth,
    memory_limit,
    missing_by_extra,
    own_groups,
)
from tests.cli.test_cli import lightship


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("x y", None)])
def test_cpu_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_quota([tmp_path]) == cores
    assert cpu_quota([tmp_path / "nowhere"]) is None


def test_memory_limit(tmp_path):
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert memory_limit([tmp_path]) == 2**31
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit([tmp_path]) is None


def test_the_tightest_group_limits(tmp_path):
    for name, quota, limit in (("outer", "max 100000", 2**32), ("inner", "50000 100000", 2**31)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.max").write_text(f"{quota}\n")
        (tmp_path / name / "memory.max").write_text(f"{limit}\n")
    groups = [tmp_path / "outer", tmp_path / "inner"]
    assert (cpu_quota(groups), memory_limit(groups)) == (0.5, 2**31)


UNLIMITED = 9223372036854771712  # what cgroup v1 says where there is no limit


def first_version(root, inside="job", quota=-1, limit=UNLIMITED, used=0, files=0):
    """The tree of cgroup v1 below `root`: a hierarchy each for processor and memory, limits in the group `inside`."""
    for group, q, b in ((".", -1, UNLIMITED), (inside, quota, limit)):
        cpu, memory = root / "cpu" / group, root / "memory" / group
        cpu.mkdir(parents=True, exist_ok=True)
        memory.mkdir(parents=True, exist_ok=True)
        (cpu / "cpu.cfs_quota_us").write_text(f"{q}\n")
        (cpu / "cpu.cfs_period_us").write_text("100000\n")
        (memory / "memory.limit_in_bytes").write_text(f"{b}\n")
        (memory / "memory.usage_in_bytes").write_text(f"{used}\n")
        (memory / "memory.stat").write_text(f"inactive_file 1\ntotal_rss 5\ntotal_inactive_file {files}\n")


def test_the_first_version_of_control_groups(tmp_path):
    """Limits of nested groups, those above `inside` unlimited; file pages of the groups within can be dropped too."""
    first_version(tmp_path, quota=150000, limit=5 * 2**20, used=4 * 2**20, files=2**20)
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/\n4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    groups = own_groups(tmp_path, own)
    assert groups == [tmp_path / name for name in ("memory/job", "memory", "cpu/job", "cpu", ".")]
    assert (cpu_quota(groups), memory_limit(groups), memory_available(groups)) == (1.5, 5 * 2**20, 2 * 2**20)


def test_a_container_of_the_first_version(tmp_path):
    """The kernel names its groups as the host sees them; its own limits lie at the top of what is mounted inside."""
    first_version(tmp_path, inside=".", limit=2**31, quota=200000)
    (tmp_path / "own").write_text("4:memory:/docker/0123\n2:cpuacct,cpu:/docker/0123\n")
    groups = own_groups(tmp_path, tmp_path / "own")
    assert (cpu_quota(groups), memory_limit(groups)) == (2.0, 2**31)


def test_no_limit_of_the_first_version(tmp_path):
    first_version(tmp_path)
    groups = [tmp_path / "memory" / "job", tmp_path / "cpu" / "job"]
    assert cpu_quota(groups) is None and memory_limit(groups) is None and memory_available(groups) > 2**30


def test_bandwidth_is_of_this_world():
    assert 5e8 < memory_bandwidth(2**24, 2) < 5e12


def test_extras():
    missing = missing_by_extra()
    assert missing["build"] == [] and {"seq2seq", "ray", "test"} <= set(missing)


FINE = {"cpu": "x", "cores": 8, "features": ["avx2", "avx512f", "amx_bf16"], "cpu_quota": None, "numa_nodes": 1,
        "memory_gb": 64.0, "memory_limit_gb": None, "memory_bandwidth_gb_s": 40.0,
        "missing": {"build": []}}  # fmt: skip


@pytest.mark.parametrize(
    ("finding", "says"),
    [
        ({"cpu_quota": 2.5}, "2 threads"),
        ({"features": []}, "no AVX2"),
        ({"features": ["avx2"]}, "no AVX-512"),
        ({"features": ["avx2", "avx512f", "avx512_bf16"]}, "bf16 without AMX"),
        ({"numa_nodes": 2}, "--workers auto"),
        ({"memory_limit_gb": 8.0}, "8.0 of 64.0 GB"),
        ({"missing": {"build": ["torch"]}}, "cannot build: torch"),
    ],
)
def test_advice(finding, says):
    assert len(advice(FINE)) == 1  # the bound on decode speed, always said
    assert any(says in line for line in advice({**FINE, **finding}))


def test_doctor():
    shown = lightship("doctor")
    assert shown.returncode == 0 and "processor" in shown.stdout and "tokens/s" in shown.stdout
    found = json.loads(lightship("doctor", "--json").stdout)
    assert set(examine()) <= set(found) and found["advice"]
