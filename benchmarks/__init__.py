"""Figures with their spread, measured side by side in one run: `python -m benchmarks.NAME`, results in docs."""
