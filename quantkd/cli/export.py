"""`quantkd export`: a trained student as a 16-bit checkpoint, a 4-bit one, or the adapter alone, also for llama.cpp."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from accelerate.utils.memory import clear_device_cache

from quantkd.cli.arguments import FORMAT, StudentArguments, load_adapted_from, load_student_from, load_tokenizer_from
from quantkd.cli.format import format_bytes, say
from quantkd.cli.parsing import option, parse_options
from quantkd.errors import ConfigError, refuse_unused
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.measure import evaluate_arm
from quantkd.hardware import process_state
from quantkd.hub.adapters import fetch_adapter
from quantkd.models.adapter_files import CONFIG, read_fields
from quantkd.models.export import check_output_dir, export_adapter, export_checkpoint, load_exported
from quantkd.models.gguf_adapters import export_gguf_adapter
from quantkd.models.provenance import Provenance, find_base
from quantkd.names import hide_home, load_tokenizer, names_gguf
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.fingerprint import check_fingerprint

_EXAMPLES = """examples:
  quantkd export --form merged --model_name_or_path MODEL --adapter runs/student --output_dir runs/merged
  quantkd export --form merged --model_name_or_path MODEL --adapter runs/student --output_dir runs/merged \\
      --held_out runs/held --run_dir runs/x
  quantkd export --form requantized --model_name_or_path MODEL --adapter runs/student --output_dir runs/4bit \\
      --held_out runs/held
  quantkd export --form adapter --model_name_or_path MODEL --adapter runs/student/checkpoint-40 --output_dir runs/a
  quantkd export --form gguf_adapter --model_name_or_path MODEL --gguf_file MODEL-Q4_0.gguf --adapter runs/student \\
      --output_dir runs/gguf
"""
_NEEDS = {
    "held_out": "run_dir batch_size", "form=requantized": "accept_loss", "form=merged form=requantized": "save_dtype",
    "form=gguf_adapter": "outtype",
}  # fmt: skip
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


@dataclass
class ExportArguments:
    """What to export, in which form, and what to score it on."""

    adapter: str = option("Folder of a trained adapter, or user/name or user/name@revision on the Hub.")
    output_dir: str = option("A new folder for the export.")
    form: Literal["merged", "requantized", "adapter", "gguf_adapter"] = option(
        "16 bit, 4 bit again, PEFT's files, or the adapter for llama.cpp."
    )
    outtype: Literal["q8_0", "f16", "f32"] = option("Type of the tensors of a GGUF adapter.", "q8_0")
    save_dtype: Literal["bfloat16", "float16", "float32"] = option("Dtype of merged weights.", "bfloat16")
    held_out: str | None = option("Transfer set to score on, before and after.", None)
    run_dir: str | None = option("Write the scores into this run's report, as arms.", None)
    accept_loss: bool = option("Let --form requantized lose some of what was learned, without a measurement.", False)
    batch_size: int = option("Rows a batch while scoring.", 8)


def main(argv: Sequence[str]) -> None:
    """Parse, export, score."""
    args, student = parse_options([ExportArguments, StudentArguments], argv, prog="quantkd export", examples=_EXAMPLES)
    args.adapter = os.path.expanduser(args.adapter)
    _check(args)
    student.refuse()
    is_file = names_gguf(student.model_name_or_path, student.gguf_file)
    if (args.form == "adapter" and not args.held_out) or (args.form == "gguf_adapter" and not is_file):
        of_repository = " model_revision trust_remote_code" * (args.form == "gguf_adapter")
        of_tokenizer = " gguf_file" * (args.form == "gguf_adapter" or _has_tokenizer(args.adapter))
        student.refuse(f"dtype attn_implementation {FORMAT}{of_tokenizer}{of_repository}")  # no student is loaded
    held_out = TransferSet.open(args.held_out) if args.held_out else None
    adapter = str(fetch_adapter(args.adapter))
    if args.form == "gguf_adapter":
        base: Any = load_student_from(student) if is_file else student.model_name_or_path
        return _describe(args.form, export_gguf_adapter(adapter, args.output_dir, base=base, outtype=args.outtype))
    # The tokenizer that was trained with is stored with the adapter, if it was saved at all.
    tokenizer = load_tokenizer(args.adapter) if _has_tokenizer(args.adapter) else load_tokenizer_from(student)
    if held_out is not None:
        what = f"The held-out set of teacher {held_out.info.teacher_name}"
        check_fingerprint(held_out.info.tokenizer_fingerprint, tokenizer, what=what, parts=("vocabulary",))
    kl: dict[str, float] = {}
    given: dict[str, Any] = {"model_name": student.model_name_or_path, "held_out": held_out}
    given["settings"] = EvaluationSettings(args.batch_size)

    def score(arm: str, model: Any) -> None:
        if held_out is None:
            return
        with TemporaryDirectory() as scratch:
            fidelity: Any = evaluate_arm(model, tokenizer, args.run_dir or scratch, arm=arm, **given).fidelity
        kl[arm] = fidelity.means["kl"]

    if args.form == "adapter":
        path = export_adapter(adapter, tokenizer, args.output_dir, base=student.model_name_or_path)
        if (own := find_base(Path(adapter))) is not None:
            say(f"It fits the 4-bit checkpoint {hide_home(str(own))} alone, and is pushed from the folder of its run.")
        if held_out is not None:
            score("after", load_adapted_from(student, Path(adapter)))
    else:
        model = load_adapted_from(student, Path(adapter))
        score("after", model)
        options = {"form": args.form, "dtype": args.save_dtype, "provenance": Provenance.read(adapter)}
        path = export_checkpoint(model, tokenizer, args.output_dir, **options)
        del model
        clear_device_cache(garbage_collection=True)
        if held_out is not None:
            score(args.form, load_exported(path))
    _describe(args.form, path)
    if held_out is not None:
        names = {"after": "adapter", "merged": "merged", "requantized": "merged and quantized again"}
        figures = ", ".join(f"{names[arm]} {value:.6f}" for arm, value in kl.items())
        say(f"KL to the teacher on {len(held_out)} rows, nats per token: {figures}.")
    if args.form == "requantized":
        cost = "what the second rounding costs was not measured."
        if kl:
            cost = (
                f"the second rounding took part of what was learned away: KL {kl['after']:.4f} with the adapter, "
                f"{kl['requantized']:.4f} in this checkpoint. --form merged and --form adapter do without it."
            )
        say(f"quantkd export: warning: {cost}", file=sys.stderr)


def _has_tokenizer(adapter: str) -> bool:
    return (Path(adapter) / "tokenizer_config.json").is_file()


def _describe(form: str, path: Path) -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    say(f"{path}: {form}, {format_bytes(size)}.")
    if form == "adapter":
        method = (Provenance.read(path).quantization or {}).get("quant_method")
        say(_advise_vllm(read_fields(path / CONFIG, str(path)), str(path), method))


def _advise_vllm(fields: dict[str, Any], path: str, method: str | None) -> str:
    """Why vLLM does not serve an adapter, or what it must be started with (vLLM's `LoRAConfig` and `PEFTHelper`)."""
    if method == "gguf":
        return "It is for a GGUF file: --form gguf_adapter writes it for llama.cpp. vLLM does not serve it."
    # It reads one rank and one alpha, and multiplies every layer by their quotient.
    unknown = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern")
    refused = [field for field in unknown if fields.get(field)]
    if fields.get("bias", "none") != "none":
        refused.append("bias")
    rank = fields.get("r", 8)
    if rank > _VLLM_RANKS[-1]:
        refused.append(f"rank {rank}, of at most {_VLLM_RANKS[-1]}")
    if refused:
        return f"vLLM does not serve this adapter as it is ({', '.join(refused)}); --form merged does without."
    least = next(each for each in _VLLM_RANKS if each >= rank)
    option = f" --max-lora-rank {least}" if least > 16 else ""  # its default
    plugin = " (with vllm-bnb-plugin, for the base model)" if method == "bitsandbytes" else ""
    return f"vLLM{plugin}: --enable-lora{option} --lora-modules NAME={shlex.quote(path)}"


def _check(args: ExportArguments) -> None:
    if process_state().num_processes > 1:
        raise ConfigError("An export is written by one process. Run it without a launcher.")
    refuse_unused(args, _NEEDS)
    if args.form == "requantized" and not (args.accept_loss or args.held_out):
        raise ConfigError(
            "A merge straight into 4 bit rounds a second time and loses part of what was learned. Give --held_out SET "
            "to see how much, or --accept_loss to take it unseen; --form merged and --form adapter lose next to none."
        )
    if args.form == "gguf_adapter" and args.held_out:
        raise ConfigError(
            "A GGUF adapter runs in llama.cpp: leave --held_out out, start the server, and measure it there with "
            "`quantkd evaluate --engine server`."
        )
    check_output_dir(args.output_dir)
