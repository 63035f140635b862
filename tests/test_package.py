"""What an installation promises before anything is computed: light import, public names, shipped files, tidiness."""

import configparser
import fnmatch
import importlib.metadata
import re
import subprocess
import sys

import pytest

import quantkd
from tests.conftest import REPOSITORY

PUBLIC_NAMES = {
    "GenerationSettings", "Nucleus", "QuantKDError", "QuantizedDistillationConfig", "QuantizedDistillationTrainer",
    "RunSettings", "Sampled", "TopK", "TopKLogprobs", "TransferSet", "capture", "quantize",
}  # fmt: skip
HEAVY = ["bitsandbytes", "matplotlib", "torch", "transformers", "trl", "vllm"]
MAX_FILE_BYTES = 500_000


def list_checkout():
    """Every file that is tracked, or would be if it were added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg", encoding="utf-8")


@pytest.mark.parametrize(("module", "heavy"), [
    ("", HEAVY), (".data.gsm8k", ["datasets", "torch", "transformers"]), (".report", ["accelerate", *HEAVY]),
    (".training.trainer", ["quantkd.hub", "quantkd.report"]),
])  # fmt: skip
def test_import_is_light(module, heavy):
    code = f"import sys, quantkd{module}; print([name for name in {heavy} if name in sys.modules])"
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout == "[]\n"


def test_public_names():
    assert set(quantkd.__all__) == PUBLIC_NAMES <= set(dir(quantkd))
    assert [name for name in PUBLIC_NAMES if getattr(quantkd, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        quantkd.no_such_name  # noqa: B018
    for page in ("docs/api.md", "docs/design.md"):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        assert {name for name in PUBLIC_NAMES if not re.search(rf"\b{name}\b", text)} == set(), page


def test_every_file_of_the_package_is_shipped_in_the_version_of_setup_cfg():
    package = REPOSITORY / "quantkd"
    patterns = SETUP["options.package_data"]["quantkd"].split()
    files = [path for path in list_checkout() if path.is_relative_to(package)]
    data = [path.relative_to(package).as_posix() for path in files if path.suffix != ".py"]
    assert "py.typed" in data
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert importlib.metadata.version("quantkd") == SETUP["metadata"]["version"] == quantkd.__version__


def test_no_file_is_too_large_for_the_repository_or_names_a_home_folder():
    home = re.compile(rb"/(?:home|Users)/\w|/roo" + rb"t/|[A-Z]:\\Users\\")
    files = [(path.name, path.read_bytes()) for path in list_checkout()]
    assert [name for name, data in files if len(data) > MAX_FILE_BYTES or home.search(data)] == []
