"""Run the tests that involve a dependency under other releases of it, installed into an overlay directory.

    python -m scripts.try_versions                        every trial of the table
    python -m scripts.try_versions transformers zarr      the trials of these
    python -m scripts.try_versions zarr==3.1.2            one that is not in the table

    pip install --target OVERLAY --no-deps zarr==3.1.4
    PYTHONPATH=OVERLAY:. pytest tests/common/cache/test_stock_zarr.py

The environment itself stays as it is. What fails here is the reason for a bound in pyproject.toml, and
docs/versions.md has the outcome. Takes about 40 minutes on two cores; pip has to reach a package index.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = (
    "tests/common/cache/test_stock_zarr.py",
    "tests/common/cache/test_codec.py",
    "tests/common/cache/test_round_trip.py",
    "tests/common/cache/test_untrusted.py",
)
STUDENT = (
    "tests/common/test_chat.py",
    "tests/common/test_fingerprint.py",
    "tests/student_train/test_families.py",
    "tests/student_train/test_model.py",
    "tests/student_train/test_round_trip.py",
)
TESTS = {
    "accelerate": ("tests/student_train/test_train.py", "tests/student_train/test_checkpoint.py"),
    "cryptography": ("tests/common/cache/test_trust.py",),
    "datasets": ("tests/common/data",),
    "google-crc32c": CACHE,
    "huggingface-hub": ("tests/common/cache/test_hub.py",),
    "jinja2": ("tests/common/cache/test_look.py",),
    "numcodecs": CACHE,
    "numpy": CACHE,
    "obstore": ("tests/common/cache/test_objects.py", "tests/common/cache/test_transfer.py"),
    "pcodec": CACHE,
    "peft": ("tests/student_train/test_model.py", "tests/student_train/test_train.py"),
    "pillow": ("tests/common/test_images.py", "tests/common/data", "tests/common/cache/test_image_files.py"),
    "pydantic": ("tests/common/test_settings.py", "tests/student_train/test_recipe.py", CACHE[3]),
    "pydantic-settings": ("tests/common/test_settings.py", "tests/student_train/test_recipe.py"),
    "tensorboard": ("tests/student_train/test_metrics.py",),
    "tqdm": ("tests/common/cache/test_transfer.py", "tests/common/data"),
    "transformers": STUDENT,
    "zarr": CACHE[:1],
}
"""Distribution to the tests that involve it."""

TRIALS = (
    "accelerate==1.1.0",
    "cryptography==44.0.0",
    "datasets==4.0.0",
    "google-crc32c==1.5.0",
    "huggingface-hub==1.5.0",
    "jinja2==3.1.0",
    "numcodecs==0.15.1 deprecated",
    "numcodecs==0.16.1",
    "numpy==2.0.0",
    "numpy==2.4.6",
    "obstore==0.8.0",
    "pcodec==0.3.0",
    "pcodec==1.1.0",
    "peft==0.17.0",
    "peft==0.18.0",
    "pillow==11.0.0",
    "pydantic==2.11.0 pydantic-core==2.33.0",
    "pydantic==2.14.4 pydantic-core==2.50.5",
    "pydantic-settings==2.15.0",
    "pydantic-settings==2.16.0",
    "tensorboard==2.18.0",
    "tqdm==4.66.0",
    "transformers==5.5.0 tokenizers==0.22.2 huggingface-hub==1.33.0",
    "transformers==5.8.1 tokenizers==0.22.2 huggingface-hub==1.33.0",
    "transformers==5.16.1 tokenizers==0.23.2 huggingface-hub==1.33.0",
    "transformers==5.24.0",
    "zarr==3.1.3 crc32c",
    "zarr==3.1.4",
)
"""What is laid over the environment together; the first is the one that is tried."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a trial."""

    packages: str
    """What was laid over."""
    passed: bool
    """Whether every test passed."""
    summary: str
    """Pytest's last line, or pip's error."""
    seconds: float
    """Time of the tests."""


def name_of(requirement: str) -> str:
    """Distribution of `zarr==3.1.4`, in one spelling."""
    return requirement.split("==")[0].split("[")[0].lower().replace("_", "-")


def run_trial(packages: str, place: Path) -> Outcome:
    """Install packages into a directory and run the tests with it first on the path.

    Args:
        packages: Requirements, separated by spaces.
        place: An empty directory.
    """
    wanted = packages.split()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command = [*install, "--target", str(place), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Outcome(packages, False, f"pip: {done.stderr.strip().splitlines()[-1]}", 0.0)
    path = os.pathsep.join([str(place), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    warnings = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]  # of other libraries
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *warnings]
    command += TESTS[name_of(wanted[0])]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    return Outcome(packages, done.returncode == 0, lines[-1], time.monotonic() - start)


def choose(wanted: Sequence[str]) -> list[str]:
    """Trials that a command line names: all, those of a distribution, or a new one.

    Raises:
        ValueError: No test is known for a distribution.
    """
    chosen: list[str] = [] if wanted else list(TRIALS)
    for each in wanted:
        if name_of(each) not in TESTS:
            raise ValueError(f"no tests are listed for {each}; choose among {', '.join(TESTS)}")
        named = [trial for trial in TRIALS if name_of(trial.split()[0]) == name_of(each)]
        chosen += [each] if "==" in each else named
    return chosen


def _outcomes(trials: Sequence[str], work: Path) -> Iterator[Outcome]:
    for index, each in enumerate(trials):
        outcome = run_trial(each, work / f"{index:02d}")
        mark = "passes" if outcome.passed else "FAILS"
        print(f"{each:<64} {mark:<7} {outcome.summary.strip('= ')}", flush=True)
        yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Try releases; 0 unless the command line is wrong: a failure is a finding."""
    parser = argparse.ArgumentParser(prog="try_versions", description=__doc__.split("\n")[0])
    parser.add_argument("package", nargs="*", help="name, or name==release with what it needs, quoted")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there")
    options = parser.parse_args(arguments)
    try:
        trials = choose(options.package)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="cascache-versions-") as work:
        outcomes = list(_outcomes(trials, Path(work)))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
