"""What the benchmarks share: a fresh process for each figure, its peak memory, and the machine in words."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

_RESULT = "RESULT "
_PACKAGES = ("sentence-transformers", "transformers", "torch", "datasets", "accelerate", "pyarrow", "pillow", "numpy")


def peak_mb() -> float:
    """The most memory that this process has held so far, mapped files included.

    ``ru_maxrss`` is only the second choice: on Linux a new process inherits it from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def in_fresh_process(script: str, *arguments: object) -> dict[str, float]:
    """What a script reports with ``report`` when it is run on one thread, without the Hub."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    # found from any folder, and also where the tests start it
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(_RESULT))


def report(**values: float) -> None:
    """Hand values to the process that waits in ``in_fresh_process``."""
    print(_RESULT + json.dumps(values))


def machine() -> str:
    """Processor, memory and versions in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    cores = f"{os.cpu_count()} cores, {processor}, {memory:.0f} GB"
    return f"{cores}; Python {platform.python_version()}, {versions}"


def write_section(title: str, text: str) -> None:
    """Put a section of RESULTS.md in the place of the one with the same title, or behind the others.

    Args:
        title: Of the section, without ``##``.
        text: Markdown; the machine, its versions and the date are put in front.
    """
    results = Path(__file__).with_name("RESULTS.md")
    head, *sections = results.read_text("utf-8").split("\n## ")
    own = f"{title}\n\n{time.strftime('%Y-%m-%d')}. {machine()}.\n\n{text.strip()}\n"
    titles = [section.partition("\n")[0] for section in sections]
    at = titles.index(title) if title in titles else len(sections)
    sections[at : at + 1] = [own]
    results.write_text("\n## ".join([head, *(section.rstrip() + "\n" for section in sections)]), "utf-8")
