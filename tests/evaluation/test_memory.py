"""Memory of child processes, size on disk, speed with the fake engine, and the probe that joins them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightship.engine import Event, FakeEngine, GenerationParams
from lightship.errors import EngineError, UnsupportedError, UsageError
from lightship.evaluation import memory, probe, speed
from lightship.report import Metric

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured on Linux only")
MEGABYTE = 2**20
HOLD = "import time; block = bytearray(b'x') * {size}; time.sleep(0.3)"


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@LINUX
def test_peak_of_a_child_is_its_own() -> None:
    small = memory.measure_in_child(python(HOLD.format(size=1)))
    large = memory.measure_in_child(python(HOLD.format(size=80 * MEGABYTE)))
    for field in ("vm_hwm_bytes", "peak_pss_bytes"):
        grown = getattr(large, field) - getattr(small, field)
        assert 75 * MEGABYTE < grown < 90 * MEGABYTE
    assert large.exit_code == 0 and large.samples > 3


@LINUX
def test_a_peak_that_is_over_before_the_end_is_kept() -> None:
    code = "import time; b = bytearray(b'x') * 80000000; time.sleep(.2); del b; time.sleep(.2)"
    used = memory.measure_in_child(python(code))
    assert used.peak_pss_bytes > 75 * MEGABYTE and used.vm_hwm_bytes > 75 * MEGABYTE


@LINUX
def test_descendants_count_in_pss_only() -> None:
    inner = HOLD.format(size=60 * MEGABYTE)
    used = memory.measure_in_child(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"))
    assert used.peak_pss_bytes > 60 * MEGABYTE > used.vm_hwm_bytes


@LINUX
def test_output_and_exit_code_are_kept_however_long() -> None:
    code = "import sys; print('y' * 300_000); print('bad', file=sys.stderr); sys.exit(7)"
    used = memory.measure_in_child(python(code))
    assert (used.exit_code, len(used.stdout), used.stderr) == (7, 300_001, "bad\n")


@LINUX
def test_a_child_past_its_limit_is_stopped() -> None:
    with pytest.raises(EngineError, match="time limit"):
        memory.measure_in_child(python("import time; time.sleep(60)"), timeout=0.2)


@LINUX
def test_a_command_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="cannot start '/no/such'"):
        memory.measure_in_child(["/no/such"])


def test_unsupported_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(UnsupportedError, match="Linux only"):
        memory.measure_in_child(python("pass"))


def test_size(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"x" * 100)
    (tmp_path / "c.json").write_bytes(b"x" * 11)
    metric = memory.size_metric(tmp_path, baseline=222)
    assert (metric.value, metric.n, metric.baseline) == (111.0, 2, 222.0) and memory.artefact_bytes(tmp_path) == 111


def test_memory_that_was_not_measured_is_no_metric() -> None:
    assert memory.memory_metrics(memory.MemoryUse(0, 0, 0, "")) == []
    names = [metric.name for metric in memory.memory_metrics(memory.MemoryUse(5, 6, 0, "", samples=2, seconds=1.0))]
    assert names == ["peak_rss", "peak_pss"]


class SpyEngine(FakeEngine):
    """Remembers every prompt and parameter, and advances a clock of its own: 2 s for prefill, 0.5 s for a token."""

    def __init__(self, clock: list[float], **options: Any) -> None:
        super().__init__(**options)
        self.clock, self.closed, self.fresh = clock, False, False
        self.seen: list[tuple[tuple[int, ...], GenerationParams]] = []

    def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
        self.seen.append((tuple(tokens), params))
        self.fresh = True
        return super().submit(tokens, params)

    def step(self) -> list[Event]:
        self.clock[0] += 2.0 if self.fresh else 0.5
        self.fresh = False
        return super().step()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_speed_by_hand(clock: list[float]) -> None:
    engine = SpyEngine(clock, vocabulary=50, eos_token_id=7)

    def open_engine() -> SpyEngine:
        clock[0] += 3.0
        return engine

    load, prefill, decode = speed.measure_speed(open_engine, 50, prompt=32, new_tokens=9, repeats=4)
    assert (load.value, prefill.value, decode.value) == (3.0, 16.0, 2.0)
    assert (prefill.n, prefill.stderr, prefill.direction) == (4, 0.0, "higher") and "median of 4" in prefill.method
    assert len(engine.seen) == 5 and engine.closed
    assert all(params.ignore_eos and params.temperature == 0 for _, params in engine.seen)


def test_every_prompt_is_new_also_when_measured_again(clock: list[float]) -> None:
    engine = SpyEngine(clock, vocabulary=50)
    for _ in range(2):
        speed.measure(engine, prompt=32, new_tokens=2, repeats=3)
    prompts = [prompt for prompt, _ in engine.seen]
    assert len({prompt[:16] for prompt in prompts}) == 8
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


def test_short_or_failed_answers_give_no_speed() -> None:
    class Short(FakeEngine):
        def submit(self, tokens: Sequence[int], params: GenerationParams) -> int:
            return super().submit(tokens, dataclasses.replace(params, max_tokens=3))

    class Failing(FakeEngine):
        def step(self) -> list[Event]:
            self._requests.clear()
            return [Event(1, finish_reason="error", error="no room")]

    with pytest.raises(EngineError, match="3 tokens instead of 8"):
        speed.measure(Short(), prompt=4, new_tokens=8, repeats=1)
    with pytest.raises(EngineError, match="no room"):
        speed.measure(Failing(), prompt=4, new_tokens=8, repeats=1)
    with pytest.raises(UsageError, match="2 new tokens"):
        speed.measure(FakeEngine(), new_tokens=1)


def test_probe_prints_metrics(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probe, "find", lambda kind, name: SimpleNamespace(open=lambda folder, settings: FakeEngine()))
    probe.main(["fake", "folder", "--prompt", "8", "--new", "4", "--repeats", "2"])
    metrics = [Metric(**entry) for entry in json.loads(capsys.readouterr().out)]
    assert [metric.name for metric in metrics][:3] == ["load", "prefill", "decode"]
    assert all(metric.value >= 0 for metric in metrics)


def test_a_failing_probe_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no target is called 'nothing_like_it'|nothing_like_it failed"):
        memory.probe("nothing_like_it", tmp_path)


def test_paired() -> None:
    def metric(name: str, value: float) -> Metric:
        return Metric(name, value, "s", 1, None, "lower", None, "")

    found = memory.paired([metric("load", 4.0)], [metric("load", 1.0), metric("new", 2.0)])
    assert [one.baseline for one in found] == [4.0, None]
