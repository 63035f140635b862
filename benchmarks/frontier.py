"""KL to the teacher against bits per weight: this library's 4-bit models beside other formats, on the same rows.

The teacher answers training questions and test questions of GSM8K once. The plain formats are NF4 and FP4 to the
nearest code and LLM.int8 (bitsandbytes), HQQ in groups of 64, torchao's integers, and GPTQ (gptqmodel, groups of 64,
calibrated on the rows that `codes` sees). This library's arms are NF4:

- `codes`: codes by error feedback, as `quantkd quantize` writes them;
- `scales`: block constants and norms distilled on top, without an adapter;
- `codes+adapter@B`: an adapter at its covariance start on `codes`, of the largest rank that fits B bits per weight;
- `codes+ranks@B`: the same bytes, with ranks by layer (`adapter_budget`);
- `scales+adapter@B`: constants, norms and such an adapter distilled together.

With --off_grid there are llama.cpp's block types too, as the package gguf writes them (it writes no K-quants): `q4_0`,
`q4_1`, `q5_0`, `q5_1`, `q8_0`, and `codes-q4_0` and `codes-q4_0+adapter@5.0`, this library's codes and adapter on the
first. Without it the teacher's weights are those of a Q4_1 file, for which some of them would look perfect.

Every arm is measured as it is saved, by one function, on the answers to the test questions: forward KL to the teacher
at every answer token, with 95% bootstrap intervals over rows. Bits per weight are those of the quantized linear layers:
codes, constants and adapters. HQQ and torchao hold some codes in wider integers; bits count them as if packed, and MB
is what is held. A format whose library is not installed is skipped, and stderr says why.

    python benchmarks/frontier.py
    python benchmarks/frontier.py --off_grid

`--off_grid` takes the teacher's weights off the grid of the file that they come from (`_off_grid.py`). What was
captured, trained and measured is kept in --cache. The table is Markdown; frontier.json and frontier.png are in the
teacher's folder there.

The last line is one JSON object. Gaps are those of `nf4`; `at_4_5_bits.kl_vs_best_plain_5_5` is the least KL of this
library's arms of at most 4.5 bits, as a share of the least of plain formats of at most 5.5.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _cache import keep_figures
from _off_grid import leave_grid
from _sources import add_sources, parse
from matplotlib.figure import Figure
from peft import PeftModel
from recovery import capture_sets, complete, set_folder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet
from quantkd.errors import QuantKDError
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.stats import RowSums, bootstrap_interval
from quantkd.files import write_file
from quantkd.hardware import default_device, native_compute_dtype
from quantkd.models.adapter_files import round_adapter
from quantkd.models.gguf_files import GgufTensor
from quantkd.models.initialization import initialize_from_rows
from quantkd.models.layer_inputs import draw_rows
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.quantize import ROWS, calibrate, quantize
from quantkd.models.ranks import allot_ranks
from quantkd.models.stored_weights import compute_size
from quantkd.models.student import attach_lora, default_lora_config, load_student, short_dtype
from quantkd.models.weights import is_quantized_layer

GROUP = 64
BITSANDBYTES = (("nf4", 4), ("fp4", 4), ("int8", 8))
BUDGETS = (4.5, 5.0)  # bits per weight
BLOCK_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # of GGUF
Figures = dict[str, Any]
Load = Callable[[], Any]


def measure(model: Any, held_out: TransferSet, bits: int) -> Figures:
    """KL of every held-out row, and the size of a model whose codes have `bits` bits."""
    size = compute_size(model)
    found = evaluate_fidelity(model, held_out, batch_size=16)
    return {
        "bits_per_weight": bits + 8 * (size.constants + size.adapters) / size.linear_weights,
        "bytes": size.total - size.rest, "weights": size.linear_weights,
        **{key: found.means[key] for key in ("kl", "top1_agreement")},
        **{key: found.columns[key].tolist() for key in ("kl_sum", "tokens")},
    }  # fmt: skip


def load_hqq(model: str, bits: int) -> Any:
    """A model quantized by HQQ's own library."""
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    dtype = native_compute_dtype()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    quantized = AutoHQQHFModel.quantize_model(network, config, compute_dtype=dtype, device=str(default_device()))
    for layer in filter(is_quantized_layer, quantized.modules()):  # constants of 16 bits, where it computes in 32, too
        layer.meta |= {key: layer.meta[key].to(torch.bfloat16) for key in ("scale", "zero")}
    return quantized


def load_torchao(model: str, bits: int) -> Any:
    """torchao's integers: 8 bits with a scale per row, or 4 with a scale and a zero point per group."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    packed = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    return load_student(model, quantization_config=TorchAoConfig(packed if bits == 4 else Int8WeightOnlyConfig()))


def load_gptq(model: str, bits: int, train: TransferSet, folder: Path) -> Any:
    """GPTQ by gptqmodel, from as many rows as the calibrated codes are made from."""
    if not folder.exists():
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 takes half of the cores, and needs two
        from gptqmodel import GPTQModel, QuantizeConfig

        ids, mask, _ = draw_rows(train, ROWS, seed=0)
        rows = [{"input_ids": row[kept.bool()]} for row, kept in zip(ids, mask, strict=True)]
        quantizer = GPTQModel.load(model, QuantizeConfig(bits=bits, group_size=GROUP), device=str(default_device()))
        quantizer.quantize(rows, batch_size=1)
        quantizer.save(str(folder))
    return load_student(str(folder))


def load_blocks(model: str, kind: str, blocks: Path | None = None) -> Any:
    """A model whose linear layers have the values of a GGUF type, rounded by the package gguf or as in a file."""
    import gguf

    number = gguf.GGMLQuantizationType[kind.upper()]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=native_compute_dtype()).to(default_device())
    stored = {} if blocks is None else load_file(blocks)
    for name, layer in list_linear(network):
        weight = layer.weight.detach().float().cpu().numpy()
        found = stored[name].numpy() if name in stored else gguf.quants.quantize(weight, number)
        layer.gguf_tensor = GgufTensor(name, number, weight.shape, found)
        layer.weight.data.copy_(layer.gguf_tensor.dequantize())
    return network


def list_linear(network: Any) -> list[tuple[str, Any]]:
    """The linear layers but the head, by name."""
    head = network.get_output_embeddings()
    return [(name, each) for name, each in network.named_modules() if type(each) is nn.Linear and each is not head]


class Ours:
    """This library's arms for one teacher; what they train is kept in its folder."""

    def __init__(self, model: str, train: TransferSet, home: Path, args: argparse.Namespace) -> None:
        self.model, self.train, self.home, self.args = model, train, home, args
        self.codes = home / "codes"

    def load_codes(self) -> Any:
        """The calibrated checkpoint."""
        if not self.codes.exists():
            quantize(self.model, self.train, self.codes)
        return load_student(str(self.codes))

    def load_block_codes(self, kind: str) -> Any:
        """Calibrated codes in a GGUF type."""
        path = self.home / f"codes-{kind}.safetensors"
        if not path.exists():
            network = load_blocks(self.model, kind)
            calibrate(network, OriginalWeights(self.model, network), draw_rows(self.train, ROWS, 0, network))
            save_file({name: torch.from_numpy(each.gguf_tensor.blocks) for name, each in list_linear(network)}, path)
        return load_blocks(self.model, kind, path)

    def load_adapter(
        self, budget: float, name: str = "codes", load: Load | None = None, *, by_layer: bool = False
    ) -> Any:
        """An adapter at its start, through the file it is saved in."""
        load = load or self.load_codes
        student = load()
        lora = default_lora_config(find_rank(student, budget))
        if by_layer:
            size = compute_size(student)
            share = size_of_rank(student) * lora.r / 8 / (size.codes + size.constants)
            lora = allot_ranks(student, lora, share, self.train, self.model, revision=None, rows=64, seed=0)
        adapted = attach_lora(student, lora)
        initialize_from_rows(adapted, self.train, self.model)
        folder = self.home / f"{name}+{'ranks' if by_layer else 'adapter'}@{budget}"
        adapted.save_pretrained(folder)
        round_adapter(folder, short_dtype(adapted))
        return PeftModel.from_pretrained(load(), folder)

    def load_scales(self, budget: float | None) -> Any:
        """Block constants and norms after a short training, beside an adapter if there is a budget for one."""
        folder, student = self.home / f"scales{'' if budget is None else f'+adapter@{budget}'}", self.load_codes()
        if not folder.exists():
            lora = None if budget is None else default_lora_config(find_rank(student, budget))
            args = QuantizedDistillationConfig(
                str(folder.with_suffix(".run")), train_scales=True, max_steps=self.args.steps,
                init_from=None if lora is None else self.model, per_device_train_batch_size=8,
                lr_scheduler_type="cosine", warmup_steps=4, packing=True, save_strategy="no", report_to=[],
                disable_tqdm=True,
            )  # fmt: skip
            trainer = QuantizedDistillationTrainer(
                str(self.codes), args, train_dataset=self.train, peft_config=lora,
                processing_class=AutoTokenizer.from_pretrained(self.model),
            )  # fmt: skip
            trainer.train()
            trainer.save_model(str(folder))
        if budget is None:
            return load_student(str(folder))
        return PeftModel.from_pretrained(load_student(str(folder / "scaled")), folder)


def find_rank(student: Any, budget: float) -> int:
    """The largest rank whose factors in 16 bits fit the budget beside the student's codes and constants."""
    size = compute_size(student)
    left = budget * size.linear_weights - 8 * (size.codes + size.constants)
    return int(left / size_of_rank(student))


def size_of_rank(student: Any) -> int:
    """Bits of a rank in every layer."""
    layers = [each for each in student.modules() if is_quantized_layer(each)]
    return 16 * sum(each.in_features + each.out_features for each in layers)


def list_arms(model: str, train: TransferSet, home: Path, args: argparse.Namespace) -> dict[str, tuple[int, Load]]:
    """Bits of a code, and what loads the model, by the name of the arm; plain formats first."""
    ours = Ours(model, train, home, args)
    plain = {name: (bits, partial(load_student, model, quantization_config=name)) for name, bits in BITSANDBYTES}
    plain |= {f"hqq-{bits}": (bits, partial(load_hqq, model, bits)) for bits in (3, 4, 5, 6, 8)}
    plain |= {f"torchao-{bits}": (bits, partial(load_torchao, model, bits)) for bits in (4, 8)}
    plain["gptq-4"] = 4, partial(load_gptq, model, 4, train, home / "gptq-4")
    own: dict[str, tuple[int, Load]] = {"codes": (4, ours.load_codes), "scales": (4, partial(ours.load_scales, None))}
    for budget in BUDGETS:
        own[f"codes+adapter@{budget}"] = 4, partial(ours.load_adapter, budget)
        own[f"codes+ranks@{budget}"] = 4, partial(ours.load_adapter, budget, by_layer=True)
        own[f"scales+adapter@{budget}"] = 4, partial(ours.load_scales, budget)
    if args.off_grid:
        plain |= {kind: (int(kind[1]), partial(load_blocks, model, kind)) for kind in BLOCK_TYPES}
        own["codes-q4_0"] = 4, (codes := partial(ours.load_block_codes, "q4_0"))
        own["codes-q4_0+adapter@5.0"] = 4, partial(ours.load_adapter, 5.0, "codes-q4_0", codes)
    return {**plain, **own}


def run_arm(bits: int, load: Load, held_out: TransferSet) -> Figures:
    """One arm's figures."""
    gc.collect()  # a model and its adapters hold each other
    return measure(load(), held_out, bits)


def compare_files(model: str, codes: Path) -> float:
    """The bytes of the calibrated checkpoint's weights, as a share of those that bitsandbytes' own takes."""
    with tempfile.TemporaryDirectory() as folder:
        load_student(model).save_pretrained(folder)
        sizes = [sum(file.stat().st_size for file in Path(each).glob("*.safetensors")) for each in (codes, folder)]
    return sizes[0] / sizes[1]


def ratio(arm: Figures, other: Figures) -> tuple[float, list[float]]:
    """One arm's KL as a share of another's, with the interval of a paired bootstrap over rows."""
    interval = bootstrap_interval(RowSums(arm["kl_sum"], other["kl_sum"]))
    return round(sum(arm["kl_sum"]) / sum(other["kl_sum"]), 4), [round(bound, 4) for bound in interval]


def tabulate(arms: dict[str, Figures]) -> str:
    """The table, in Markdown."""
    columns = ("Arm", "Bits per weight", "MB", "KL, nats per token", "Of NF4's gap recovered")
    lines = [f"| {' | '.join(columns)} |", "| --- | ---: | ---: | --- | --- |"]
    for name, arm in arms.items():
        low, high = bootstrap_interval(RowSums(arm["kl_sum"], arm["tokens"]))
        share, (least, most) = ratio(arm, arms["nf4"])
        gap = "" if name == "nf4" else f"{1 - share:.1%} [{1 - most:.1%}, {1 - least:.1%}]"
        size = f"{arm['bits_per_weight']:.2f} | {arm['bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {size} | {arm['kl']:.4f} [{low:.4f}, {high:.4f}] | {gap} |")
    return "\n".join(lines)


def draw(arms: dict[str, Figures], teacher: str) -> Figure:
    """KL against bits per weight, both kinds of arms labelled."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for own, color, marker in ((False, "#5A5A5A", "o"), (True, "#0072B2", "D")):
        chosen = {name: arm for name, arm in arms.items() if is_ours(name) == own}
        bits, kl = ([arm[key] for arm in chosen.values()] for key in ("bits_per_weight", "kl"))
        errors = [bootstrap_interval(RowSums(arm["kl_sum"], arm["tokens"])) for arm in chosen.values()]
        spread = [[abs(value - pair[side]) for value, pair in zip(kl, errors, strict=True)] for side in (0, 1)]
        label = "quantkd" if own else "formats as they are"
        axes.errorbar(bits, kl, yerr=spread, fmt=marker, color=color, capsize=2, label=label)
        for name, x, y in zip(chosen, bits, kl, strict=True):
            # Arms of the same bits lie close: one's label goes up, the other's down.
            down = name.startswith("scales")
            where: Any = {"rotation": -30 if down else 30 * own, "va": "top" if down else "bottom"}
            axes.annotate(name, (x, y), (5, -3 if down else 3), textcoords="offset points", color=color, **where)
    axes.margins(x=0.1)
    axes.set(yscale="log", xlabel="Bits per weight of the linear layers, adapters included")
    axes.set(ylabel="KL to the teacher, nats per token", title=f"{teacher}, answers to GSM8K test questions")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def is_ours(name: str) -> bool:
    """Whether an arm is one of this library's."""
    return name.startswith(("codes", "scales"))


def summarize(arms: dict[str, Figures]) -> Figures:
    """The JSON line; a figure whose arms were skipped is null, and stderr says so."""

    def fit(limit: float, own: bool) -> Figures | None:
        within = [arm for name, arm in arms.items() if is_ours(name) == own and arm["bits_per_weight"] <= limit]
        return min(within, key=lambda arm: arm["kl"], default=None)

    nf4 = arms.get("nf4")
    pairs = {f"{name}.kl_gap_recovered": (arms.get(name), nf4) for name in ("codes", "scales")}
    pairs["at_4_5_bits.kl_vs_best_plain_5_5"] = fit(4.5, True), fit(5.5, False)
    pairs["at_5_bits.kl_gap_recovered"] = fit(5.0, True), nf4
    summary: Figures = {}
    for key, (arm, other) in pairs.items():
        if arm is None or other is None:
            print(f"{key} is null: an arm that it needs was skipped.", file=sys.stderr)
            summary[key] = None
            continue
        value, interval = ratio(arm, other)
        if "gap" in key:
            value, interval = round(1 - value, 4), [round(1 - bound, 4) for bound in reversed(interval)]
        summary |= {key: value, f"{key}_ci95": interval}
    return summary


def main() -> None:
    """Capture, run every arm, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/frontier", help="where everything is kept and found again")
    parser.add_argument(
        "--off_grid", action="store_true", help="take the teacher's weights off their file's grid first"
    )
    parser.add_argument("--rows", type=int, default=256, help="training questions")
    parser.add_argument("--held_out_rows", type=int, default=64, help="test questions to measure on")
    parser.add_argument("--max_new_tokens", type=int, default=160, help="length limit of an answer")
    parser.add_argument("--storage_mass", type=float, default=0.95, help="of the nucleus that is stored")
    parser.add_argument("--steps", type=int, default=32, help="of 8 rows, where block constants are trained")
    parser.add_argument("--arms", nargs="+", help="run these alone; figures that need others are null")
    args = parse(parser)

    def open_sets(model: str, home: Path) -> list[TransferSet]:
        place = complete(args, model=model, cache=str(home))
        capture_sets(place)
        return [TransferSet.open(set_folder(place, name)) for name in ("train", "held_out")]

    model, home = args.model, Path(args.cache) / Path(args.model).name
    if args.off_grid:
        home, own = home.with_name(f"{home.name}-off-grid"), home
        if not (home / "teacher").exists():
            leave_grid(model, open_sets(model, own)[0], home / "teacher")
        model = str(home / "teacher")
    train, held_out = open_sets(model, home)
    sets = {"train": train.digest, "held_out": held_out.digest}
    arms: dict[str, Figures] = {}
    skipped: dict[str, str] = {}
    for name, (bits, load) in list_arms(model, train, home, args).items():
        if args.arms and name not in args.arms:
            continue
        settings = {"name": name, "steps": args.steps if name.startswith("scales") else 0, **sets}
        try:
            arms[name] = keep_figures(home, name, settings, partial(run_arm, bits, load, held_out))
        except (ImportError, QuantKDError) as error:
            skipped[name] = f"{type(error).__name__}: {error}"
            print(f"{name} is skipped: {skipped[name]}", file=sys.stderr, flush=True)
            continue
        print(f"{name}: {arms[name]['bits_per_weight']:.2f} bits, KL {arms[name]['kl']:.4f}", flush=True)
    summary = summarize(arms)
    if (codes := home / "codes").exists():
        files = keep_figures(home, "files", sets, lambda: {"ratio": compare_files(model, codes)})
        summary["file_bytes_vs_bnb"] = round(files["ratio"], 5)
    teacher = {"off_grid": json.loads((Path(model) / "off_grid.json").read_text())} if args.off_grid else {}
    everything = {"summary": summary, "arms": arms, "skipped": skipped, "settings": {**vars(args), **teacher}}
    write_file(home / "frontier.json", json.dumps(everything, indent=1))
    if "nf4" in arms:
        print(f"\n{tabulate(arms)}\n")
        draw(arms, home.name).savefig(home / "frontier.png")
        print(f"Picture: {home / 'frontier.png'}")
    print(json.dumps({**summary, **{key: getattr(args, key) for key in ("rows", "held_out_rows", "off_grid")}}))


if __name__ == "__main__":
    main()
