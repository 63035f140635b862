"""`quantkd quantize`: a 4-bit checkpoint whose codes are chosen for the inputs of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkd.cli.format import format_bytes, say
from quantkd.cli.parsing import plain_parser, whole_number
from quantkd.models.quantize import ROWS, quantize
from quantkd.transfer_set import TransferSet

_EXAMPLES = """examples:
  quantkd quantize MODEL --transfer_set runs/set --output_dir runs/4bit
  quantkd quantize MODEL --transfer_set runs/set --output_dir runs/4bit --student_format fp4 --rows 48
  quantkd quantize MODEL --gguf_file MODEL-Q4_0.gguf --transfer_set runs/set --output_dir runs/gguf

The folder is an ordinary checkpoint of bitsandbytes; `quantkd train --model_name_or_path runs/4bit` trains on it. With
--gguf_file it holds a file of the same name, size and metadata, for llama.cpp.
"""


def main(argv: Sequence[str]) -> None:
    """Quantize, and say where and how large."""
    parser = plain_parser("quantkd quantize", _EXAMPLES)
    parser.add_argument("model", help="the full-precision checkpoint: a Hub name or a folder")
    parser.add_argument("--transfer_set", required=True, help="the model's own answers, whose rows give the inputs")
    parser.add_argument("--output_dir", required=True, help="a new folder for the checkpoint")
    parser.add_argument("--student_format", choices=("nf4", "fp4"), help="4-bit format (nf4)")
    parser.add_argument("--gguf_file", help="or: choose the codes of this GGUF file of the model, on its own grid")
    parser.add_argument("--rows", type=whole_number(1), default=ROWS, help=f"rows that give the inputs ({ROWS})")
    parser.add_argument("--seed", type=int, default=0, help="of the rows' draw (0)")
    parser.add_argument("--dtype", help="of other weights: bfloat16, float16 or float32; by the hardware if left out")
    parser.add_argument("--model_revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    args = parser.parse_args(argv)
    options = {"revision": args.model_revision} if args.model_revision else {}
    if args.gguf_file:
        options["gguf_file"] = args.gguf_file
    path = quantize(
        args.model, TransferSet.open(args.transfer_set), Path(args.output_dir),
        quantization_config=args.student_format, dtype=args.dtype, rows=args.rows, seed=args.seed,
        trust_remote_code=args.trust_remote_code, **options,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))
    name = args.gguf_file and Path(args.gguf_file).name
    say(f"{path}: {name or args.student_format or 'nf4'} with calibrated codes, {format_bytes(size)}.")
