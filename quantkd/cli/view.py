"""`quantkd view`: the divergence page, one HTML file that shows where a student differs from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkd.cli.arguments import StudentArguments, load_adapted_from, load_tokenizer_from
from quantkd.cli.format import format_bytes, say
from quantkd.cli.parsing import option, parse_options
from quantkd.errors import ConfigError
from quantkd.hub.adapters import fetch_adapter
from quantkd.transfer_set import TransferSet
from quantkd.view import collect_divergence, write_page

_EXAMPLES = """examples:
  quantkd view --held_out runs/held --model_name_or_path MODEL --adapter runs/student --output page.html
  quantkd view --held_out runs/held --model_name_or_path MODEL --adapter me/my-adapter --output page.html \\
      --alternatives 4 --batch_size 2
"""


@dataclass
class ViewArguments:
    """Rows, adapter and output of the page."""

    held_out: str = option("Transfer set of held-out rows to show.")
    adapter: str = option("Trained adapter, a folder or user/name on the Hub; off is before, on is after.")
    output: str = option("The HTML file to write.")
    rows: int = option("Number of rows, from the front of the set.", 50)
    alternatives: int = option("Number of the teacher's top tokens to show.", 8)
    batch_size: int = option("Rows per batch.", 8)

    def __post_init__(self) -> None:
        for name in ("rows", "alternatives", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; expected at least 1.")
        if not self.output.lower().endswith((".html", ".htm")):
            raise ConfigError(f"--output is {self.output!r}; expected a file name that ends in .html.")


def main(argv: Sequence[str]) -> None:
    """Parse, run the student twice, write the page."""
    args, student = parse_options([ViewArguments, StudentArguments], argv, prog="quantkd view", examples=_EXAMPLES)
    student.refuse()
    held_out, adapter = TransferSet.open(args.held_out), fetch_adapter(args.adapter)
    model, tokenizer = load_adapted_from(student, adapter), load_tokenizer_from(student)
    how = {name: getattr(args, name) for name in ("rows", "alternatives", "batch_size")}
    names = {"student_name": student.model_name_or_path, "adapter_name": args.adapter}
    divergence = collect_divergence(model, held_out, tokenizer, **how, **names)
    path = write_page(divergence, Path(args.output))
    before, after = divergence.mean_kl
    say(
        f"{path}: {len(divergence.rows)} rows, {divergence.num_tokens} tokens, {format_bytes(path.stat().st_size)}; "
        f"KL {before:.4f} before, {after:.4f} after"
    )
