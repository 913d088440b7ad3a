"""The OpenVINO target beyond its gates."""

import subprocess
import sys


def test_a_signal_after_an_engine_was_closed(bundle_path):
    """OpenVINO leaves the thread with a signal stack that is freed: Ctrl-C was a segmentation fault."""
    code = f"""
import os, signal, time
from pathlib import Path
from lightship.targets import openvino
engine = openvino.open(Path({str(bundle_path / "targets" / "openvino")!r}))
engine.close()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
