"""Collect the wheels that a GPU machine without a network needs, into `.gpu-kit`.

    make gpu-kit

The machine is expected to have Python 3.12 on Linux x86-64 and the packages of PROVIDED. Versions
are those of constraints.txt. The result is checked: every requirement of this library and of each
wheel is met by another wheel, is PROVIDED or NOT_USED, and all wheels together stay below
LARGEST_MIB.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".gpu-kit"
LARGEST_MIB = 55

# Large packages of the machine's own.
PROVIDED = {"numpy", "pandas", "pyarrow", "pytest", "scipy", "torch", "triton"}
# Imported where a report is written or a written text is judged, which nothing of the kit does.
NOT_USED = {"matplotlib", "rouge-score", "sacrebleu"}
NAMES = """
accelerate aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio attrs certifi
charset-normalizer click datasets datasketch dill evaluate filelock frozenlist fsspec ftfy h11
hf-xet httpcore2 httpx2 huggingface_hub hypothesis idna jinja2 liger-kernel markdown-it-py
markupsafe mdurl multidict multiprocess packaging peft propcache psutil pydantic pydantic_core
pygments pyyaml regex requests rich safetensors shellingham sortedcontainers tokenizers tqdm
transformers trl truststore typer typing-inspection typing_extensions urllib3 wcwidth xxhash yarl
"""
# Published as sources only. A wheel is built if it holds no compiled code; else it is left out.
SOURCES = {"deepspeed": ["einops", "hjson", "msgpack", "ninja", "py-cpuinfo"]}

TARGET = ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"]
for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1"):
    TARGET += ["--platform", f"{tag}_x86_64"]
MARKERS = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "sys_platform": "linux",
    "os_name": "posix",
    "extra": "",
}


def pinned() -> dict[str, str]:
    """Versions by normalised name, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def versions(names: list[str]) -> list[str]:
    """NAME==VERSION for each name."""
    known = pinned()
    if unknown := [name for name in names if canonicalize_name(name) not in known]:
        raise SystemExit(f"no version in constraints.txt for {', '.join(unknown)}: add one")
    return [f"{name}=={known[canonicalize_name(name)]}" for name in names]


def pip(command: str, *words: str) -> str:
    """Run pip quietly; return an empty string, or its last error."""
    call = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*call, "--no-deps", *words], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or [done.stderr.strip()])[-1]


def collect(folder: Path) -> list[str]:
    """Fill the folder; return one line for each package that had to be left out."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    if error := pip("download", *TARGET, "--dest", str(folder), *versions(NAMES.split())):
        raise SystemExit(f"pip could not download the wheels: {error}")
    left_out = []
    for name, needs in SOURCES.items():
        words = ["--no-build-isolation", "--wheel-dir", str(folder), *versions([name])]
        error = pip("wheel", *words)
        built = list(folder.glob(f"{name}-*.whl"))
        if not error and not built[0].name.endswith("-none-any.whl"):
            built[0].unlink()
            error = "its wheel holds compiled code"
        error = error or pip("download", *TARGET, "--dest", str(folder), *versions(needs))
        if error:
            left_out.append(f"{name}: {error}")
    return left_out


def requirements(folder: Path) -> Iterator[tuple[str, Requirement]]:
    """What this library and each wheel require, by the name of who requires it."""
    for line in requires("hf-distill") or []:
        yield "hf-distill", Requirement(line)
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (path,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(path).decode())
        for line in metadata.get_all("Requires-Dist", []):
            yield metadata["Name"], Requirement(line)


def unmet(wanted: Iterator[tuple[str, Requirement]], held: Mapping[str, str]) -> list[str]:
    """One line for each requirement that neither the kit nor the machine meets."""
    found = []
    for owner, requirement in wanted:
        name = canonicalize_name(requirement.name)
        elsewhere = requirement.marker and not requirement.marker.evaluate(MARKERS)
        if name in PROVIDED | NOT_USED or elsewhere:
            continue
        if name not in held:
            found.append(f"{owner} needs {requirement.name}, which is not in the kit")
        elif not requirement.specifier.contains(held[name], prereleases=True):
            found.append(f"{owner} needs {requirement}, but the kit has {held[name]}")
    return found


def main() -> None:
    left_out = collect(FOLDER)
    wheels = sorted(FOLDER.glob("*.whl"))
    held = {
        name: str(version) for name, version, *_ in (parse_wheel_filename(w.name) for w in wheels)
    }
    if problems := unmet(requirements(FOLDER), held):
        raise SystemExit("the kit is not complete:\n" + "\n".join(problems))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    if size > LARGEST_MIB:
        raise SystemExit(
            f"the kit has {size:.1f} MiB, above {LARGEST_MIB} MiB: leave a package out"
        )
    print(f"{len(wheels)} wheels, {size:.1f} MiB, in {FOLDER}")
    for line in left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    main()
