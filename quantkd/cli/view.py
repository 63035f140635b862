"""`quantkd view`: the divergence page, one HTML file that shows where a student differs from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantkd.cli.arguments import StudentArguments, load_student_from
from quantkd.cli.format import format_bytes
from quantkd.cli.parsing import parse_options
from quantkd.errors import ConfigError
from quantkd.hub.adapters import load_adapter
from quantkd.names import load_tokenizer, public_name
from quantkd.transfer_set import TransferSet
from quantkd.view import collect_divergence, write_page

_EXAMPLES = """examples:
  quantkd view --held_out runs/held --model_name_or_path MODEL --adapter runs/student --output page.html
  quantkd view --held_out runs/held --model_name_or_path MODEL --adapter runs/student --output page.html --rows 10
  quantkd view --held_out runs/held --model_name_or_path MODEL --adapter me/my-adapter --output page.html \\
      --alternatives 4 --batch_size 2
"""


@dataclass
class ViewArguments:
    """Rows, adapter and output of the page."""

    held_out: str = field(metadata={"help": "Transfer set of held-out rows to show."})
    adapter: str = field(
        metadata={"help": "Trained adapter, a folder or user/name on the Hub; off is before, on is after."}
    )
    output: str = field(metadata={"help": "The HTML file to write."})
    rows: int = field(default=50, metadata={"help": "Number of rows, from the front of the set."})
    alternatives: int = field(default=8, metadata={"help": "Number of the teacher's top tokens to show."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})

    def __post_init__(self) -> None:
        for name in ("rows", "alternatives", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        if not self.output.lower().endswith((".html", ".htm")):
            raise ConfigError(f"--output is {self.output!r}; expected a file name that ends in .html.")


def main(argv: Sequence[str]) -> None:
    """Parse, run the student twice, write the page."""
    args, student = parse_options([ViewArguments, StudentArguments], argv, prog="quantkd view", examples=_EXAMPLES)
    if not student.model_name_or_path:
        raise ConfigError("--model_name_or_path is missing; expected the teacher's own checkpoint.")
    held_out = TransferSet.open(args.held_out)
    model = load_student_from(student)
    tokenizer = load_tokenizer(
        student.model_name_or_path,
        revision=student.model_revision,
        trust_remote_code=student.trust_remote_code,
    )
    adapted = load_adapter(model, args.adapter)
    divergence = collect_divergence(
        adapted,
        held_out,
        tokenizer,
        rows=args.rows,
        alternatives=args.alternatives,
        batch_size=args.batch_size,
        student_name=public_name(student.model_name_or_path),
        adapter_name=public_name(args.adapter),
    )
    path = write_page(divergence, Path(args.output))
    before, after = divergence.mean_kl
    print(
        f"{path}: {len(divergence.rows)} rows, {divergence.num_tokens} tokens, {format_bytes(path.stat().st_size)}; "
        f"KL {before:.4f} before, {after:.4f} after"
    )
