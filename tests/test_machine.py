"""What `lightship doctor` finds, and what it makes of it."""

import json

import pytest

from lightship.machine import advice, cpu_quota, examine, memory_bandwidth, memory_limit, missing_by_extra
from tests.cli.test_cli import lightship


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("x y", None)])
def test_cpu_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_quota(tmp_path) == cores
    assert cpu_quota(tmp_path / "nowhere") is None


def test_memory_limit(tmp_path):
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert memory_limit(tmp_path) == 2**31
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) is None


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
        ({"cpu_quota": 2.5}, "--threads 2"),
        ({"features": []}, "no AVX2"),
        ({"features": ["avx2"]}, "no AVX-512"),
        ({"features": ["avx2", "avx512f", "avx512_bf16"]}, "bf16 without AMX"),
        ({"numa_nodes": 2}, "numactl"),
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
