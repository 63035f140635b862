"""What this library does on the CUDA card of this machine, in ten minutes and one JSON object.

The parts are processes, one after the other. Each has a limit, and all together have --minutes: a part that runs out is
ended with the processes that it started, and recorded so; the others run.

- `tests`: those marked `gpu`;
- `loss`: loss.py at 8,192 positions of Llama-3.1-8B's head in bfloat16;
- `shapes`: a random model of Llama-3.1-8B's widths, of --layers layers, and its distributions of word problems;
- `step.sft`, `step.quantkd_t1`, `step.quantkd_scales`: steps of step.py on its NF4 copy;
- `capture`: capture.py with it as the teacher;
- `recovery`: recovery.py's arms `before`, `start` and `quantkd-0` on --model, in the time that is left.

    make gpu MODEL=FOLDER
    python benchmarks/gpu.py --model FOLDER

--device cpu --quick tries the parts without a card, at tiny sizes. docs/gpu.md says what each figure means. The object
is the last line, and gpu.json in --output, beside what each part printed. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from _sources import add_sources, look_for_gsm8k
from transformers import AutoConfig

from quantkd.data.arithmetic import generate_problems
from quantkd.data.demo_model import load_demo_model
from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.files import write_file
from quantkd.names import naming

BEGAN = time.monotonic()
HERE = Path(__file__).resolve().parent
LIBRARIES = ("quantkd", "torch", "transformers", "bitsandbytes", "peft", "accelerate", "trl", "triton", "liger-kernel")
WIDE = {"hidden": 4096, "inner": 14_336, "heads": 32, "keys": 8, "vocabulary": 128_256}  # Llama-3.1-8B
TINY = {"hidden": 64, "inner": 128, "heads": 4, "keys": 2, "vocabulary": 512}
SHARPER = 6  # times the usual head: logits as far apart as a trained model's, and so few entries per token
PARTS = ("tests", "loss", "shapes", "step", "capture", "recovery")
STEPS = ("sft", "quantkd_t1", "quantkd_scales")
LEAST_SECONDS = 5  # a part is not begun with less
Figures = dict[str, Any]


def read_figures(text: str) -> Figures:
    """The last JSON object in what a benchmark printed; a Trainer's figures are Python's, and a line may be half."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError):
            if line.startswith("{"):
                return dict(json.loads(line))
    return {}


def count_tests(text: str) -> Figures:
    """How many tests passed, failed or were skipped, by pytest's last line."""
    return {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)}


@dataclass(frozen=True)
class Part:
    """A process, its share of ten minutes in seconds, how its figures are read, and the folder that it needs."""

    name: str
    command: list[str]
    seconds: float
    read: Callable[[str], Figures] = read_figures
    needs: Path | None = None
    skipped: str = ""


@dataclass
class Clock:
    """The time that is left for all parts."""

    seconds: float
    began: float = field(default=BEGAN)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)


def run_part(part: Part, output: Path, clock: Clock) -> Figures:
    """Run a part within its limit; what came of it, and why there are no figures if there are none."""
    if part.skipped:
        return {"status": "skipped", "why": part.skipped}
    if part.needs is not None and not part.needs.exists():
        return {"status": "skipped", "why": "the part `shapes` did not end; this one needs its model and rows"}
    limit = min(part.seconds * clock.seconds / 600, clock.left())
    if limit < LEAST_SECONDS:
        return {"status": "skipped", "why": f"{max(0, limit):.0f} s of {clock.seconds:.0f} s were left"}
    began, log = time.monotonic(), output / f"{part.name}.log"
    with log.open("w") as file:
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        process = subprocess.Popen(
            part.command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    text = log.read_text(errors="replace")
    figures = part.read(text)
    result: Figures = {"status": "done", "seconds": round(time.monotonic() - began, 1)}
    if code is None:
        result |= {"status": "out of time", "limit_seconds": round(limit, 1)}
    elif code:
        result |= {"status": "failed", "exit_status": code}
    elif set(figures) == {"skipped"}:
        return {"status": "skipped", "why": figures["skipped"]}
    if result["status"] != "done":
        result["said"] = [line for line in text.splitlines() if line.strip()][-5:]
    return result | ({"figures": figures} if figures else {})


def build_parts(args: argparse.Namespace, scratch: Path) -> list[Part]:
    """Every part in its order."""
    shapes, rows, problems = scratch / "shapes", scratch / "rows", scratch / "problems"
    sizes = {"positions": 8192, "hidden_size": 4096, "vocab_size": 128_256, "rounds": 5, "dtype": "bfloat16"}
    tokens, prompts, trained = 64, 32, {"rows": 32, "held_out_rows": 16, "max_new_tokens": 96, "rank": 16}
    if args.quick:
        sizes |= {"positions": 256, "hidden_size": 64, "vocab_size": 8192, "rounds": 1, "dtype": "float32"}
        tokens, prompts, trained = 4, 4, {"rows": 8, "held_out_rows": 4, "max_new_tokens": 8, "rank": 4}

    def script(name: str, **options: Any) -> list[str]:
        words = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, str(HERE / f"{name}.py"), *words]

    python_tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    model, missing = (str(shapes), "") if args.quick and not args.model else find_model(args.model)
    questions = find_questions(args.gsm8k, problems)
    step = {"model": shapes, "set": rows, "scratch": scratch / "steps", "steps": 3, "warm_up": 2}
    return [
        Part("tests", [*python_tests, f"--device={args.device}", str(HERE.parent / "tests" / "test_gpu.py")], 90,
             count_tests),
        Part("loss", script("loss", device=args.device, **sizes), 100),
        Part("shapes", [*script("gpu", only=scratch, layers=args.layers), *(["--quick"] * args.quick)], 70),
        *(Part(f"step.{name}", script("step", only=name, **step), 45, needs=rows) for name in STEPS),
        Part("capture", script("capture", model=shapes, gsm8k=problems, prompts=prompts, batch_size=prompts,
                               max_new_tokens=tokens, rounds=1), 60, needs=shapes),
        Part("recovery", [*script("recovery", model=model, gsm8k=questions, cache=scratch / "recovery", **trained),
                          "--arms", "before", "start", "quantkd-0"], 600, skipped=missing),
    ]  # fmt: skip


def find_model(name: str | None) -> tuple[str, str]:
    """The checkpoint to recover, or why there is none."""
    try:
        return name or str(load_demo_model()), ""
    except MissingDependencyError as error:
        return "", f"no checkpoint was named (make gpu MODEL=FOLDER), and the demo's is not here. {error}"


def find_questions(folder: str | None, problems: Path) -> Path:
    """GSM8K's folder; where none is named or found, one with built-in word problems in its form, made in any case."""
    problems.mkdir()
    for seed, name in enumerate(("train", "test")):
        lines = [json.dumps(row) for row in generate_problems(64, seed)]
        (problems / f"{name}.jsonl").write_text("\n".join(lines))
    return look_for_gsm8k(folder) or problems


def make_shapes(folder: Path, layers: int, sizes: dict[str, int]) -> None:
    """The random model with a small tokenizer, and its distributions at the tokens of given answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    from quantkd import RunSettings, capture
    from quantkd.hardware import default_device, native_compute_dtype

    problems = generate_problems(32, 2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for row in problems for text in row.values()], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    special = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["inner"],
        num_hidden_layers=layers, num_attention_heads=sizes["heads"], num_key_value_heads=sizes["keys"],
        max_position_embeddings=8192, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(default_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=native_compute_dtype()).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPER)
    model.generation_config = GenerationConfig(**special)
    for each in (model, wrapped):
        each.save_pretrained(folder / "shapes")
    given = [{"prompt": row["question"], "completion": row["answer"]} for row in problems]
    rows = capture(model, given, folder / "rows", tokenizer=wrapped, responses="given", run=RunSettings(progress=False))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"layers": layers, "parameters": count, "entries_per_token": round(rows.info.mean_entries, 1)}))


def describe_card(device: str) -> Figures | None:
    """The card, its driver and its CUDA; None on a CPU."""
    if device == "cpu":
        return None
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        driver = None
    return {
        "name": found.name, "memory_gib": round(found.total_memory / 2**30, 1), "count": torch.cuda.device_count(),
        "capability": f"{found.major}.{found.minor}", "driver": driver, "cuda": torch.version.cuda,
    }  # fmt: skip


def list_versions() -> dict[str, str | None]:
    """The libraries' versions; null for one that is not installed."""

    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": sys.version.split()[0], **{name: find(name) for name in LIBRARIES}}


def say_what_is_missing() -> str:
    """Why there is no CUDA device, in a line."""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    driver = "nvidia-smi" if shutil.which("nvidia-smi") else "no nvidia-smi"
    return (
        f"No CUDA device was found: torch {torch.__version__} is built {build}, and this machine has {driver}. Run it "
        "on a machine with an NVIDIA card, with a torch for CUDA (make install TORCH=torch), or try the parts at tiny "
        "sizes: python benchmarks/gpu.py --device cpu --quick"
    )


def summarize(parts: dict[str, Figures]) -> Figures:
    """The figures to look at first; those that were not measured are left out."""
    found = {name: part.get("figures", {}) for name, part in parts.items()}
    summary: Figures = {}
    if "fused_t1" in found.get("loss", {}):
        fused = found["loss"]["fused_t1"]
        keys = ("time_vs_matmuls", "time_vs_ce", "memory_vs_ce")
        summary |= {f"loss.{key}": round(fused[key], 3) for key in keys}
    steps = {name: found[f"step.{name}"] for name in STEPS if found.get(f"step.{name}")}
    for name, other in (("quantkd_t1", "sft"), ("quantkd_scales", "quantkd_t1")):
        if name in steps and other in steps:
            own, others = (sorted(steps[each]["seconds"])[len(steps[each]["seconds"]) // 2] for each in (name, other))
            memory = steps[name]["step_mib"] / steps[other]["step_mib"]
            summary |= {f"step.{name}.time_vs_{other}": round(own / others, 3)}
            summary |= {f"step.{name}.memory_vs_{other}": round(memory, 3)}
    for key in ("time_vs_generate", "memory_vs_step_logits"):
        if key in found.get("capture", {}):
            summary[f"capture.{key}"] = found["capture"][key]
    arms = found.get("recovery", {})
    if arms:
        summary["recovery.kl"] = {name: round(arm["kl"], 5) for name, arm in arms.items()}
    peaks = {name: steps[name]["peak_mib"] for name in steps}
    if "memory" in arms.get("quantkd-0", {}):
        peaks["recovery"] = arms["quantkd-0"]["memory"] / 2**20
    return summary | ({"peak_mib": {name: round(peak) for name, peak in peaks.items()}} if peaks else {})


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what the last part would fail at, before the first."""
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes}; expected more than 0.")
    if args.gsm8k and look_for_gsm8k(args.gsm8k) is None:
        parser.error(f"There is no train.jsonl in {args.gsm8k}. Name GSM8K's folder, or none for built-in problems.")
    if args.model:
        try:
            with naming(args.model):
                AutoConfig.from_pretrained(args.model)
        except ConfigError as error:
            parser.error(str(error))


@contextmanager
def made_folder(output: Path) -> Iterator[Path]:
    """A folder for gigabytes, which goes at the end."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        yield Path(folder)


def main() -> None:
    """Parse, run every part, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the JSON and of the logs")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--layers", type=int, default=8, help="of the 8B model's 32; all of them need 16 GB of disk")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="run these alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the parts run")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)  # make the shapes there
    args = parser.parse_args()
    if args.only:
        make_shapes(args.only, args.layers, TINY if args.quick else WIDE)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(say_what_is_missing())
    check(parser, args)
    args.layers = 2 if args.quick else args.layers
    clock = Clock(60 * args.minutes - 5)
    report: Figures = {"card": describe_card(args.device), "versions": list_versions()}
    report["settings"] = {key: getattr(args, key) for key in ("minutes", "layers", "device", "quick")}
    report["settings"] |= {
        "model": args.model and Path(args.model).name,
        "gsm8k": look_for_gsm8k(args.gsm8k) is not None,
    }
    parts: dict[str, Figures] = {}
    with made_folder(args.output) as scratch:
        for part in build_parts(args, scratch):
            if args.parts and part.name.split(".")[0] not in args.parts:
                continue
            parts[part.name] = run_part(part, args.output, clock)
            print(f"{part.name}: {json.dumps(parts[part.name])}", flush=True)
            report |= {"summary": summarize(parts), "parts": parts, "seconds": round(clock.seconds - clock.left(), 1)}
            write_file(args.output / "gpu.json", json.dumps(report, indent=1))
    print(json.dumps(report))
    sys.exit(any(part["status"] == "failed" for part in parts.values()))


if __name__ == "__main__":
    main()
