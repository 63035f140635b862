"""KL of GGUF files with and without this library's codes and adapters, inside llama.cpp and by llama.cpp's own figure.

Every arm is one file, or a file and an adapter, that llama.cpp runs as it is. `llama-perplexity --kl-divergence`
compares it with the 16-bit file on questions and answers of GSM8K's test part, on which nothing was fitted. KLD is in
nats per token.

- `Q4_0`, ...: llama-quantize's files; `Q4_0 imatrix`: with an importance matrix of the rows that the codes see;
- `Q4_0 codes`: the same file with codes by error feedback, as `quantkd quantize --gguf_file` writes it;
- `Q4_0 + adapter`: on llama-quantize's file, an adapter at its covariance start, not trained, in Q8_0;
- `Q4_0 codes + adapter`: the same on the codes;
- `Q4_0 codes + distilled`: that adapter after one epoch on the teacher's answers to training questions.

    make llamacpp-tools
    python benchmarks/engine.py
    python benchmarks/engine.py --off_grid

`--off_grid` takes the teacher's weights off the grid of the file that they come from first (`_off_grid.py`). What was
made and measured is kept in --cache. The table is Markdown.

With --speed_rounds the decode speed of four forms is measured in turn, each round anew: `speed` holds the median tokens
per second of one thread's processor time, as a share of the plain Q4_0 file's. A merged student is an F16 file.

With --agreement_rows the KL of Q4_0, its codes and its adapter is measured on the teacher's answers to as many test
questions: by `evaluate_fidelity`, by it with the inputs of linear layers rounded as llama.cpp rounds them on a CPU, and
by `evaluate_served` inside llama.cpp. `agreement` holds the three.

The last line is one JSON object. A `kld_ratio` is an arm's KLD as a share of that of its type's plain file; of the
arms with an adapter, `q4_0_adapter` and `q4_0_distilled` are those on the codes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _cache import keep_figures
from _llamacpp import CONVERTER, PACKAGES, measure_kld, run_tool, serve, tool
from _off_grid import leave_grid
from _sources import add_sources, find_gsm8k, parse
from peft import PeftModel
from recovery import capture_sets, complete, set_folder
from transformers import AutoTokenizer

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet, quantize
from quantkd.data.gsm8k import load_gsm8k, remove_calculator_marks
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.files import write_file
from quantkd.models.gguf_adapters import FILE_NAME, export_gguf_adapter
from quantkd.models.initialization import initialize_from_rows
from quantkd.models.student import attach_lora, default_lora_config, load_student
from quantkd.teacher.model_server import ModelServer
from quantkd.teacher.served import evaluate_served
from quantkd.training.config import CALIBRATED_RATE

SPEED_TOKENS = 96
TYPES = ["Q4_0", "Q4_0 imatrix", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q4_K_M imatrix", "Q5_K_M"]
WITH_CODES = ["Q4_0", "Q4_1", "Q5_0", "Q4_K_M", "Q4_K_M imatrix"]
CONTEXT = 512  # tokens of a chunk; llama-perplexity looks at the second half of each
Arm = tuple[Path, Path | None]


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """A file or folder that is made if it is not there; what fails leaves nothing behind."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"new-{path.name}")
        make(draft)
        draft.rename(path)
    return path


def convert(model: str, path: Path) -> None:
    """The 16-bit file, by llama.cpp's converter."""
    script = str(CONVERTER.with_name("convert_hf_to_gguf.py"))
    words = [sys.executable, script, model, "--outtype", "f16", "--outfile", str(path)]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(PACKAGES)}, capture_output=True)


def write_text(args: argparse.Namespace, path: Path) -> None:
    """Test questions with their answers."""
    rows = load_gsm8k(find_gsm8k(args.gsm8k), "test", args.test_rows)
    texts = [f"Question: {row['question']}\nAnswer: {remove_calculator_marks(row['answer'])}\n\n" for row in rows]
    write_file(path, "".join(texts))


class Files:
    """The files of one teacher."""

    def __init__(self, model: str, train: TransferSet, home: Path, args: argparse.Namespace) -> None:
        self.model, self.train, self.home, self.args = model, train, home, args
        self.full = once(home / "F16.gguf", partial(convert, model))

    def plain(self, kind: str) -> Path:
        """llama-quantize's file, with an importance matrix if the kind says so."""
        kind, _, weighted = kind.partition(" ")
        words = ("--imatrix", self.imatrix()) if weighted else ()
        make = partial(self._quantize, kind, words)
        return once(self.home / f"{kind}{weighted and '-imatrix'}.gguf", make)

    def _quantize(self, kind: str, words: tuple[str | Path, ...], path: Path) -> None:
        run_tool("llama-quantize", *words, self.full, path, kind)

    def imatrix(self) -> Path:
        """llama.cpp's importance matrix, of the rows that codes are chosen for."""

        def write(path: Path) -> None:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            write_file(path, "\n".join(tokenizer.decode(row["input_ids"]) for row in self.train))

        text = once(self.home / "train.txt", write)
        words = ("-m", self.full, "-f", text, "-c", str(CONTEXT), "--parse-special", "--no-repack")
        return once(self.home / "imatrix.gguf", lambda path: run_tool("llama-imatrix", *words, "-o", path))

    def codes(self, kind: str) -> Path:
        """The same with other codes."""
        plain = self.plain(kind)
        make = partial(quantize, self.model, self.train, gguf_file=str(plain), progress=False)
        return once(self.home / f"{plain.stem}-codes", make) / plain.name

    def adapter(self, base: Path) -> Path:
        """An adapter at its start."""

        def make(folder: Path) -> None:
            student = load_student(self.model, gguf_file=str(base))
            adapted = attach_lora(student, default_lora_config(self.args.rank))
            initialize_from_rows(adapted, self.train, self.model)
            adapted.save_pretrained(folder)

        return self._export(once(self._beside(base, "start"), make))

    def distilled(self, base: Path) -> Path:
        """An adapter after one epoch."""

        def make(folder: Path) -> None:
            args = QuantizedDistillationConfig(
                str(folder) + "-run", init="covariance", init_from=self.model, alpha=1.0,
                num_train_epochs=1, per_device_train_batch_size=8, learning_rate=self.args.learning_rate,
                lr_scheduler_type="cosine", warmup_steps=2, packing=True, save_strategy="no", report_to=[],
                disable_tqdm=True, logging_steps=4,
            )  # fmt: skip
            trainer = QuantizedDistillationTrainer(
                load_student(self.model, gguf_file=str(base)), args, train_dataset=self.train,
                processing_class=AutoTokenizer.from_pretrained(self.model),
                peft_config=default_lora_config(self.args.rank),
            )  # fmt: skip
            trainer.train()
            trainer.save_model(str(folder))

        return self._export(once(self._beside(base, "distilled"), make))

    def _beside(self, base: Path, what: str) -> Path:
        name = base.stem if base.parent == self.home else base.parent.name
        return self.home / f"{name}-r{self.args.rank}-{what}"

    def _export(self, adapter: Path) -> Path:
        make = partial(export_gguf_adapter, str(adapter), base=self.model)
        return once(adapter.with_name(f"{adapter.name}-gguf"), make) / FILE_NAME


def list_arms(files: Files, args: argparse.Namespace) -> dict[str, Callable[[], Arm]]:
    """What makes an arm's files, by its name; of the main types all arms, of the others llama-quantize's file."""

    def adapted(kind: str, make: Callable[[Path], Path], base: Callable[[str], Path]) -> Arm:
        return base(kind), make(base(kind))

    arms: dict[str, Callable[[], Arm]] = {"F16": lambda: (files.full, None)}
    for kind in args.types:
        arms[kind] = lambda kind=kind: (files.plain(kind), None)
        if kind in args.codes:
            arms[f"{kind} codes"] = lambda kind=kind: (files.codes(kind), None)
        if kind in args.adapters:
            arms[f"{kind} + adapter"] = partial(adapted, kind, files.adapter, files.plain)
            arms[f"{kind} codes + adapter"] = partial(adapted, kind, files.adapter, files.codes)
        if kind in args.distilled:
            arms[f"{kind} codes + distilled"] = partial(adapted, kind, files.distilled, files.codes)
    return arms


def tabulate(arms: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = ["| Arm | MB | KLD, nats per token | Same most probable token | Of its type's KLD |"]
    lines.append("| --- | ---: | --- | ---: | ---: |")
    for name, arm in arms.items():
        base = arms.get(name.split()[0], arm)
        share = "" if base is arm else f"{arm['kld'] / base['kld']:.3f}"
        kld = f"{arm['kld']:.4f} ± {arm['kld_error']:.4f}"
        lines.append(f"| {name} | {arm['bytes'] / 1e6:.1f} | {kld} | {arm['same_top']:.1f}% | {share} |")
    return "\n".join(lines)


def summarize(arms: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The JSON line; a figure whose arms were left out is null."""

    def ratio(name: str, other: str, key: str = "kld") -> float | None:
        return round(arms[name][key] / arms[other][key], 4) if name in arms and other in arms else None

    found: dict[str, float | None] = {}
    for kind in ("Q4_0", "Q4_K_M"):
        own = {"codes": "codes", "plain_adapter": "+ adapter", "adapter": "codes + adapter"}
        for key, words in {**own, "distilled": "codes + distilled"}.items():
            found[f"{kind.lower()}_{key}.kld_ratio"] = ratio(f"{kind} {words}", kind)
    found["q4_0_codes.kld_vs_imatrix"] = ratio("Q4_0 codes", "Q4_0 imatrix")
    found["q4_k_m_codes.kld_vs_imatrix"] = ratio("Q4_K_M codes", "Q4_K_M imatrix")
    found["q4_0_adapter.bytes_vs_q5_0"] = ratio("Q4_0 codes + adapter", "Q5_0", "bytes")
    found["q4_0_adapter.kld_vs_q5_0"] = ratio("Q4_0 codes + adapter", "Q5_0")
    return found


def measure_speed(forms: dict[str, Arm], rounds: int) -> dict[str, float]:
    """Tokens per second of processor time while decoding, as a share of the first form's; other load matters little."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (model, lora) in forms.items():
            few, many = (count_seconds(model, lora, tokens) for tokens in (8, 8 + SPEED_TOKENS))
            found[name].append(SPEED_TOKENS / (many - few))
    print({name: [round(each, 1) for each in speeds] for name, speeds in found.items()}, flush=True)
    speeds = {name: statistics.median(each) for name, each in found.items()}
    return {name: round(speed / speeds[next(iter(forms))], 3) for name, speed in speeds.items()}


def count_seconds(model: Path, lora: Path | None, tokens: int) -> float:
    """The processor's time of a server of one thread that starts, writes some tokens, and stops."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with serve(model, lora) as url:
        post(url, {"prompt": "Question: How many legs have three cats?", "n_predict": tokens, "ignore_eos": True})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def round_inputs(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inputs (..., in) as llama.cpp gives them to the kernels of Q4_0: int8, with a float16 scale for each 32."""
    blocks = args[0].float().unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0).round()
    return ((codes * scales.half().float()).flatten(-2).to(args[0].dtype),)


def measure_agreement(model: str, forms: dict[str, Arm], held_out: TransferSet, home: Path) -> dict[str, list[float]]:
    """KL of each form by our evaluation, by ours with rounded inputs, and by the engine."""
    found = {}
    for name, (file, lora) in forms.items():
        student = load_student(model, gguf_file=str(file), dtype=torch.float32)
        linear = [layer for layer in student.modules() if isinstance(layer, torch.nn.Linear)]
        if lora is not None:
            student = PeftModel.from_pretrained(student, str(lora.parent).removesuffix("-gguf"))
        own = [evaluate_fidelity(student, held_out, progress=False)]
        for layer in linear:
            layer.register_forward_pre_hook(round_inputs)
        own.append(evaluate_fidelity(student, held_out, progress=False))
        with serve(file, lora) as url:
            served = evaluate_served(ModelServer(url), held_out, home / "served", arm=file.parent.name, progress=False)
        found[name] = [round(each.means["kl"], 5) for each in (*own, served.fidelity)]
        print(f"{name}: KL {found[name]} here, with rounded inputs, in llama.cpp", flush=True)
    return found


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's own completion."""
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def main() -> None:
    """Make the files, measure each in llama.cpp, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/engine", help="where everything is kept and found again")
    parser.add_argument("--off_grid", action="store_true", help="take the teacher's weights off their grid first")
    parser.add_argument("--rows", type=int, default=96, help="training questions")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="length limit of the teacher's answers")
    parser.add_argument("--test_rows", type=int, default=64, help="test questions whose text is measured on")
    parser.add_argument("--chunks", type=int, default=16, help=f"of {CONTEXT} tokens, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=CALIBRATED_RATE)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--codes", nargs="*", default=WITH_CODES, help="types with arms of codes")
    parser.add_argument("--adapters", nargs="*", default=["Q4_0", "Q4_K_M"], help="types with arms of adapters")
    parser.add_argument("--distilled", nargs="*", default=["Q4_0", "Q4_K_M"], help="types with arms that are trained")
    parser.add_argument("--agreement_rows", type=int, default=0, help="test questions to compare figures on")
    parser.add_argument("--speed_rounds", type=int, default=0, help="of four forms each, for their decode speed")
    args = parse(parser)
    if not (tool("llama-perplexity").is_file() and CONVERTER.is_file()):
        print(json.dumps({"skipped": "no llama-perplexity; make llamacpp-tools builds it"}))
        return
    args.storage_mass, args.held_out_rows = 0.95, 1
    home = Path(args.cache) / Path(args.model).name

    def capture(model: str, home: Path) -> TransferSet:
        place = complete(args, model=model, cache=str(home))
        capture_sets(place)
        return TransferSet.open(set_folder(place, "train"))

    if args.off_grid:
        home, own = home.with_name(f"{home.name}-off-grid"), home
        if not (home / "teacher").exists():
            leave_grid(args.model, capture(args.model, own), home / "teacher")
        args.model = str(home / "teacher")
    train = capture(args.model, home)
    files = Files(args.model, train, home, args)
    text = once(home / f"test-{args.test_rows}.txt", partial(write_text, args))
    words = ("-m", files.full, "-f", text, "-c", str(CONTEXT), "--chunks", str(args.chunks), "--no-repack")
    logits = home / f"test-{args.test_rows}-{args.chunks}.logits"
    once(logits, lambda path: run_tool("llama-perplexity", *words, "--kl-divergence-base", path))
    arms: dict[str, dict[str, Any]] = {}
    makers = list_arms(files, args)
    for name, make in sorted(makers.items(), key=lambda arm: "distilled" in arm[0]):  # which takes longest, last
        model, lora = make()
        paths = [each for each in (model, lora) if each is not None]

        def measure(model: Path = model, lora: Path | None = lora, paths: list[Path] = paths) -> dict[str, Any]:
            return {
                "bytes": sum(each.stat().st_size for each in paths),
                **measure_kld(model, logits, lora, n_ctx=CONTEXT),
            }

        facts = {"name": name, "set": train.digest, "text": logits.name}
        facts |= {key: getattr(args, key) for key in ("rank", "learning_rate")}
        arms[name] = keep_figures(home, name.replace(" ", "-"), facts, measure)
        print(f"{name}: {arms[name]['bytes'] / 1e6:.1f} MB, KLD {arms[name]['kld']:.4f}", flush=True)
    arms = {name: arms[name] for name in makers}
    print(f"\n{tabulate(arms)}\n")
    further: dict[str, Any] = {}
    if args.agreement_rows:
        place = complete(args, cache=str(home), held_out_rows=args.agreement_rows)
        capture_sets(place)
        held_out = TransferSet.open(set_folder(place, "held_out"))
        forms = {name: makers[name]() for name in ("Q4_0", "Q4_0 codes", "Q4_0 codes + adapter")}
        further["agreement"] = measure_agreement(args.model, forms, held_out, home)
    if args.speed_rounds:
        names = ("Q4_0", "Q4_0 codes", "Q4_0 codes + distilled", "F16")
        further["speed"] = measure_speed({name: makers[name]() for name in names}, args.speed_rounds)
    print(json.dumps({**summarize(arms), **further, "off_grid": args.off_grid, "rank": args.rank, "rows": args.rows}))


if __name__ == "__main__":
    main()
