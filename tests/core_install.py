"""An installation of the core alone, without PyTorch, for each Python: its size, and every verb on real files.

    python tests/core_install.py [--python python3.10 --python python3.13 …] [--wheel-from FOLDER]

`make test-core` runs it, and `make release-check` with the wheels of a release. It makes virtual environments in a
temporary folder and installs the package as a user would, so it takes minutes and a package index; the suite leaves it
out. Fails if an installation is larger than stated, a verb ends otherwise than expected, a merged value is not what a
formula in float64 gives, or no Python was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_MB = 140
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# What `make` and pip leave in a checkout, and would be taken into the package.
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", "tests", "benchmarks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="an interpreter; those on the PATH unless given")
    parser.add_argument("--wheel-from", help="a folder with wheels, of which pip chooses; the checkout unless given")
    parser.add_argument("--inside", action="store_true", help="try every verb with the Python that runs this")
    parser.add_argument(
        "--torch", action="store_true", help="with --inside: PyTorch is installed, and nothing imports it"
    )
    options = parser.parse_args()
    if options.inside:
        return inside(has_torch=options.torch)
    found = options.python or [name for name in PYTHONS if runs(name)]
    failed = [name for name in found if not install_and_try(name, options.wheel_from)]
    for name in [] if options.python else [name for name in PYTHONS if name not in found]:
        print(f"{name}: skipped, it is not on the PATH")
    print(f"{len(found) - len(failed)} of {len(found)} passed" + "".join(f", {name} failed" for name in failed))
    return 1 if failed or not found else 0


def runs(python: str) -> bool:
    """Whether an interpreter is there; a name on the PATH may only stand for one that is not installed."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-V"], capture_output=True, check=False).returncode == 0


def install_and_try(python: str, wheels: str | None) -> bool:
    """Whether the core of this Python has the promised size and does what it must."""
    with tempfile.TemporaryDirectory(prefix="loraformat-core-") as name:
        folder = Path(name)
        venv, source = folder / "venv", folder / "source"
        if wheels is None:
            shutil.copytree(ROOT, source, ignore=_LEFT_OUT)
        what = [source] if wheels is None else ["--find-links", wheels, "--only-binary", "loraformat", exact()]
        subprocess.run([python, "-m", "venv", venv], check=True)
        empty = megabytes(venv)
        programs = venv / ("Scripts" if os.name == "nt" else "bin")
        pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *what], check=True)
        size = megabytes(venv) - empty
        environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        command = [programs / "python", "-I", Path(__file__).resolve(), "--inside"]
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        print(
            f"{python}: {size:.0f} MB beyond an empty environment (at most {MOST_MB}), exit {done.returncode}",
            flush=True,
        )
        return size <= MOST_MB and not done.returncode


def exact() -> str:
    """The requirement of this version and no other, whatever an index has."""
    text = (ROOT / "loraformat" / "_version.py").read_text(encoding="utf-8")
    return f"loraformat=={re.findall(r'= .([0-9.a-z]+)', text)[0]}"


def megabytes(folder: Path) -> float:
    """What all files below a folder take of the disk, in units of 2^20 bytes, as `du -m` counts them."""
    found = (path.lstat() for path in folder.rglob("*") if not path.is_dir())
    return sum(getattr(each, "st_blocks", -(-each.st_size // 512)) * 512 for each in found) / 2**20


# From here on it runs in the environment of the core: nothing but its own dependencies may be imported.


def inside(*, has_torch: bool) -> int:
    assert (importlib.util.find_spec("torch") is not None) == has_torch, "is torch installed here?"
    fixtures = ROOT / "fixtures"
    run("demo")
    run("formats", forbidden=COMPILED)
    for adapter in sorted((fixtures / "good").glob("*/*")):
        has_yaml = bool({"litgpt", "nemo"} & set(adapter.parts))
        forbidden = () if has_yaml else COMPILED
        run("inspect", adapter, forbidden=forbidden)
        run("inspect", adapter, "--norms")
        run("validate", adapter, expected=(0, 1), forbidden=forbidden)
        run("validate", adapter, "--deep", expected=(0, 1))
    peft = fixtures / "good" / "peft" / "tiny-llama"
    run("convert", peft, "--to", "native", "--container", "pt", "-o", "native-pt")
    run("convert", "native-pt", "--to", "peft", "--base-model", "loraformat/tiny-llama", "-o", "back")
    run("diff", peft, "back")
    run("plot", peft, "-o", "plot.html")
    run("plot", peft, "-o", "plot.svg", expected=(3,), contains="LF029")
    minigpt = fixtures / "minigpt"
    run("estimate", minigpt / "base", "--rank", "8", "--targets", "all-linear")
    merge = ("merge", minigpt / "base", minigpt / "lora_adapter", "--alpha", "1.0", "--verify", "full")
    run(*merge, "-o", "from-pt")
    run(*merge, "--dtype", "bfloat16", "--rounding", "stochastic", "--container", "safetensors", "-o", "stochastic")
    run("verify", "from-pt")
    if not has_torch:
        run(*merge, "--device", "cuda", "-o", "never", expected=(3,), contains="LF029")
    for name, (weights, config, expected) in cases().items():
        merged(name, weights, config, expected)
    return 0


COMPILED = ("numpy", "torch", "yaml", "blake3", "safetensors", "hf_xet")
PROBE = """
import json, sys
from loraformat.cli import main
try:
    main(sys.argv[1:], prog_name="loraformat")
    code = 0
except SystemExit as left:
    code = left.code or 0
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def run(
    *arguments: object, expected: tuple[int, ...] = (0,), contains: str = "", forbidden: tuple[str, ...] = ()
) -> None:
    """Run a verb; its exit code is one of those expected, it imports nothing that is forbidden, and never torch."""
    command = [sys.executable, "-I", "-c", PROBE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = f"loraformat {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    assert done.stderr.strip(), shown
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code in expected, f"exit {code}, expected {expected}: {shown}"
    assert contains in done.stdout + done.stderr, shown
    assert "Traceback" not in done.stderr, shown
    assert not {*forbidden, "torch"} & set(modules), f"{sorted({*forbidden, 'torch'} & set(modules))}: {shown}"


ROWS, COLS, RANK, ALPHA = 12, 10, 2, 3.0


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any]]]:
    """Name → (tensors of a PEFT adapter by role, settings, the merged weight of a base weight in float64).

    Formulas: peft 0.21.2, tuners/lora/layer.py, tuners/lora/dora.py, tuners/loha/layer.py, tuners/lokr/layer.py.
    """
    import numpy as np

    chance = np.random.default_rng(5)

    def some(*shape: int) -> Any:
        return chance.standard_normal(shape).astype(np.float32)

    def wide(values: Any) -> Any:
        return values.astype(np.float64)

    scale = ALPHA / RANK
    a, b, magnitude = some(RANK, COLS), some(ROWS, RANK), abs(some(ROWS)) + 1
    kernel_a, kernel_b = some(RANK, 4, 3, 3), some(ROWS, RANK, 1, 1)
    w1a, w1b, w2a, w2b = some(ROWS, RANK), some(RANK, COLS), some(ROWS, RANK), some(RANK, COLS)
    left, right, table = some(3, 2), some(4, 5), some(ROWS + 3, COLS)
    convolution = (wide(kernel_b)[:, :, 0, 0] @ wide(kernel_a).reshape(RANK, -1)).reshape(ROWS, 4, 3, 3)

    def dora(base: Any) -> Any:
        changed = base + scale * (wide(b) @ wide(a))
        return wide(magnitude)[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)

    lora = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK}
    return {
        "lora": ({"lora_A.weight": a, "lora_B.weight": b}, lora, lambda base: base + scale * (wide(b) @ wide(a))),
        "dora": (
            {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude},
            {**lora, "use_dora": True},
            dora,
        ),
        "convolution": (
            {"lora_A.weight": kernel_a, "lora_B.weight": kernel_b},
            lora,
            lambda base: base + scale * convolution,
        ),
        "loha": (
            {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b},
            {"peft_type": "LOHA", "alpha": ALPHA, "r": RANK},
            lambda base: base + scale * (wide(w1a) @ wide(w1b)) * (wide(w2a) @ wide(w2b)),
        ),
        "lokr": (
            {"lokr_w1": left, "lokr_w2": right},
            {"peft_type": "LOKR", "alpha": ALPHA, "r": RANK},
            lambda base: base + scale * np.kron(wide(left), wide(right)),
        ),
        "saved-table": (
            {"lora_A.weight": a, "lora_B.weight": b, "../embed.weight": table[:ROWS]},
            {**lora, "modules_to_save": ["embed"]},
            lambda base: base + scale * (wide(b) @ wide(a)),
        ),
        "resized-table": (
            {"lora_A.weight": a, "lora_B.weight": b, "../embed.weight": table},
            {**lora, "modules_to_save": ["embed"]},
            lambda base: base + scale * (wide(b) @ wide(a)),
        ),
    }


def merged(name: str, tensors: Mapping[str, Any], settings: Mapping[str, Any], expected: Callable[[Any], Any]) -> None:
    """Merge one adapter of one module into a small base, in the stored dtype and in another, and compare all values."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    shape = (ROWS, 4, 3, 3) if name == "convolution" else (ROWS, COLS)
    base = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    folder = Path(name)
    for part in ("base", "adapter"):
        (folder / part).mkdir(parents=True)
    table = np.random.default_rng(7).standard_normal((ROWS, COLS)).astype(np.float32)
    stored = {"proj.weight": base, "norm.weight": base[0].copy(), "embed.weight": table}
    save_file(stored, folder / "base" / "model.safetensors")
    roles = {f"proj.{role}".replace("proj.../", ""): values for role, values in tensors.items()}
    save_file(
        {f"base_model.model.{role}": values for role, values in roles.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    config = {"target_modules": ["proj"], "base_model_name_or_path": "tiny", "task_type": None, **settings}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    run("merge", folder / "base", folder / "adapter", "--verify", "full", "-o", folder / "merged")
    run("merge", folder / "base", folder / "adapter", "--dtype", "float16", "-o", folder / "half")
    exact = expected(base.astype(np.float64))
    for output, half_unit in (("merged", 2.0**-24), ("half", 2.0**-11)):
        written = load_file(folder / output / "model.safetensors")
        found = written["proj.weight"].astype(np.float64)
        wanted = roles.get("embed.weight", table).astype(written["embed.weight"].dtype)
        assert np.array_equal(written["embed.weight"], wanted), name
        gap = abs(found - exact)
        room = half_unit * abs(exact) * (1 + 1e-6) + (2.0**-25 if output == "half" else 1e-12)
        assert found.shape == exact.shape, name
        assert bool((gap <= room).all()), f"{name}: {output}: {gap.max()}"


if __name__ == "__main__":
    sys.exit(main())
