"""What a student that was made from one domain's answers keeps on another's, and what a mixture keeps of both.

The teacher answers GSM8K's training questions, and is asked for short examples of Python's own functions
(examples/python_docs.py). From either set, and from half of both, a student is made: calibrated codes, an adapter at
its start, and trained for an epoch. Each is measured on held-out prompts of both domains, which are in no set.

    python benchmarks/domains.py

The table is Markdown: KL in nats per token, with the share of the gap to the teacher that is closed. What was captured,
made and measured is kept in --cache. The last line is one JSON object: by domain that is measured, arm and domain that
was learned from, the KL and `kl_gap_recovered` with its 95% interval over rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _cache import keep_figures
from _sources import add_sources, parse
from peft import PeftModel
from recovery import capture_sets, complete, gap_recovered, measure, open_train
from transformers import AutoTokenizer

from quantkd import QuantizedDistillationConfig, QuantizedDistillationTrainer, TransferSet
from quantkd.models.quantize import quantize_once
from quantkd.models.student import default_lora_config, load_student
from quantkd.teacher import load_teacher

DOMAINS = ("gsm8k", "python_docs")
ARMS = ("codes", "start", "trained")


def make_student(args: argparse.Namespace, rows: TransferSet, folder: Path) -> None:
    """Codes, start and trained adapter from these answers, each in its folder, once."""
    quantize_once(args.model, rows, folder / "codes")
    if (folder / "trained" / "adapter_config.json").is_file():
        return
    trainer = QuantizedDistillationTrainer(
        load_student(str(folder / "codes")),
        QuantizedDistillationConfig(
            str(folder / "trained"), init_from=args.model, per_device_train_batch_size=args.batch_size, packing=True,
            num_train_epochs=1, lr_scheduler_type="cosine", warmup_steps=4, save_strategy="no", report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=default_lora_config(args.rank),
    )  # fmt: skip
    trainer.save_model(str(folder / "start"))
    trainer.train()
    trainer.save_model()


def load_arm(args: argparse.Namespace, folder: Path, arm: str) -> Any:
    """A student as others load it."""
    if arm == "teacher":
        return load_teacher(args.model)[0]
    if arm == "before":
        return load_student(args.model)
    student = load_student(str(folder / "codes"))
    return student if arm == "codes" else PeftModel.from_pretrained(student, folder / arm)


def main() -> None:
    """Capture, make the students, measure each on both domains, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/domains", help="where everything is kept and found again")
    parser.add_argument("--rows", type=int, default=128, help="prompts that a student is made from")
    parser.add_argument("--held_out_rows", type=int, default=48, help="prompts of each domain to measure on")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length limit of an answer")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    args = parse(parser)
    places = {name: complete(args, domain=name, cache=str(Path(args.cache) / name)) for name in DOMAINS}
    for place in places.values():
        capture_sets(place)
    sets = {name: open_train(place) for name, place in places.items()}
    sets["both"] = TransferSet.concatenate([rows[: args.rows // 2] for rows in sets.values()])
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    for learned, rows in {"": None, **sets}.items():
        folder = Path(args.cache) / "students" / f"{learned}-{args.rows}-{args.rank}"
        if rows is not None:
            make_student(complete(args), rows, folder)
        for arm in ("teacher", "before") if rows is None else ARMS:
            for name, place in places.items():
                settings = {key: str(value) for key, value in vars(args).items() if key != "cache"}
                settings |= {"learned": learned, "measured": name}

                def run(arm: str = arm, place: Any = place, folder: Path = folder) -> dict[str, Any]:
                    return measure(load_arm(args, folder, arm), place)

                arms.setdefault(name, {})[" ".join(filter(None, (arm, learned)))] = keep_figures(
                    args.cache, f"{learned}-{arm}", settings, run
                )
    found = {
        name: {
            key: {"kl": round(each["kl"], 5)}
            | dict(zip(("kl_gap_recovered", "ci95"), gap_recovered(own, key), strict=True))
            for key, each in own.items()
            if key != "teacher"
        }
        for name, own in arms.items()
    }
    print(f"\n| Made from | | {' | '.join(f'KL on {name}' for name in DOMAINS)} |\n| --- | --- | ---: | ---: |")
    for key in found[DOMAINS[0]]:
        arm, _, learned = key.partition(" ")
        cells = (f"{own[key]['kl']:.4f}, {own[key]['kl_gap_recovered']:.1%}" for own in found.values())
        print(f"| {learned} | {arm} | {' | '.join(cells)} |")
    print(json.dumps({**found, "rows": args.rows, "held_out_rows": args.held_out_rows}))


if __name__ == "__main__":
    main()
