"""llama.cpp's server on the loopback address, and its tools, from the environment of `make llamacpp-env`.

The wheel `xllamacpp` has the server in process, so a Python of that environment starts it, prints its address, and
stops when its input is closed. Its tools are built by `make llamacpp-tools`.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CONVERTER", "PACKAGES", "PYTHON", "measure_kld", "run_tool", "serve", "tool"]

_ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-llamacpp"
PYTHON = _ENVIRONMENT / "bin" / "python"
PACKAGES = _ENVIRONMENT / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
CONVERTER = _ENVIRONMENT / "llama.cpp" / "convert_lora_to_gguf.py"
# no_extra_bufts is `--no-repack`: without it a build with AMX code crashed on quantized models on one processor.
_SCRIPT = """
import json, sys
import xllamacpp as engine
asked = json.loads(sys.argv[1])
params = engine.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = asked["model"], asked["n_ctx"], 1
params.no_extra_bufts, params.fit_params, params.ui, params.verbosity = True, False, False, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
if asked["lora"]:
    params.lora_adapters = [engine.CommonAdapterLoraInfo(asked["lora"], 1.0)]
server = engine.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def serve(model: Path, lora: Path | None = None, *, n_ctx: int = 1024, threads: int = 1) -> Iterator[str]:
    """The address of a server of a GGUF file, with an adapter on it or none."""
    asked = {"model": str(model), "lora": lora and str(lora), "n_ctx": n_ctx, "threads": threads}
    with tempfile.TemporaryFile("w+") as log:
        words = [str(PYTHON), "-c", _SCRIPT, json.dumps(asked)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(words, text=True, **pipes)  # type: ignore[call-overload]
        try:
            ready, _, _ = select.select([process.stdout], [], [], 120)
            address = process.stdout.readline().strip() if ready else ""
            if not address:
                log.seek(0)
                raise RuntimeError(f"llama.cpp did not start with {model.name}: {log.read()[-2000:]}")
            yield address
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def tool(name: str) -> Path:
    """Where one of llama.cpp's tools is, such as `llama-perplexity`."""
    return _ENVIRONMENT / "bin" / name


def run_tool(name: str, *words: str | Path, seconds: float = 3600) -> str:
    """What a tool prints."""
    command = [str(tool(name)), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{name} exited with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def measure_kld(
    model: Path, base_logits: Path, lora: Path | None = None, *, n_ctx: int = 512, threads: int | None = None
) -> dict[str, float]:
    """llama.cpp's own `--kl-divergence` of a model against stored logits: mean KLD, its error, agreement in percent."""
    words: list[str | Path] = ["-m", model, "--kl-divergence", "--kl-divergence-base", base_logits, "--no-repack"]
    words += ["-c", str(n_ctx), "-t", str(threads or os.cpu_count()), *(["--lora", lora] if lora else [])]
    said = run_tool("llama-perplexity", *words)
    number = r"\s*([-\d.]+)\s*±\s*([-\d.]+)"
    mean = re.search(rf"Mean\s+KLD:{number}", said)
    same = re.search(rf"Same top p:{number}", said)
    if mean is None or same is None:
        raise RuntimeError(f"llama-perplexity gave no KLD for {model.name}: {said[-2000:]}")
    return {"kld": float(mean[1]), "kld_error": float(mean[2]), "same_top": float(same[1])}
