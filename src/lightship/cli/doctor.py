"""Look at this machine: what it has, what is slow on it and why, what is missing."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """Examine this machine and what is installed on it."""
    from lightship.machine import advice, examine

    found = examine()
    said = advice(found)
    if as_json:
        click.echo(json.dumps({**found, "advice": said}))
        return
    extras = [f"{extra} {'complete' if not lacks else 'lacks ' + ', '.join(lacks)}"
              for extra, lacks in found["missing"].items()]  # fmt: skip
    rows = {
        "processor": f"{found['cpu']}, {found['cores']} cores usable",
        "quota": f"{found['cpu_quota'] or 'no limit on'} cores",
        "features": ", ".join(found["features"]) or "none of those that matter here",
        "NUMA nodes": found["numa_nodes"] or "unknown",
        "memory": f"{found['memory_gb']} GB, {found['memory_available_gb']} GB available, "
                  f"{found['memory_bandwidth_gb_s']} GB/s measured",
        "system": f"{found['system']}, Python {found['python']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "extras": "; ".join(extras),
    }  # fmt: skip
    for name, value in rows.items():
        click.echo(f"{name:12}{value}")
    click.echo("\n" + "\n".join(f"• {line}" for line in said))
