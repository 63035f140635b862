"""What vLLM serves of an adapter, and how it is started for it (vLLM's `LoRAConfig` and `PEFTHelper`)."""

from __future__ import annotations

from pathlib import Path

from quantkd.models.adapter_files import read_fields

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
_DEFAULT_RANK = 16


def advise_vllm(adapter: Path) -> list[str]:
    """Lines that say why vLLM does not serve a saved adapter, or what it must be started with."""
    fields = read_fields(adapter / "adapter_config.json", str(adapter))
    refused = [
        name for name in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices") if fields.get(name)
    ]
    # It reads one rank and one alpha, and multiplies every layer by their quotient.
    refused += [name for name in ("rank_pattern", "alpha_pattern") if fields.get(name)]
    if fields.get("bias", "none") != "none":
        refused.append("bias")
    rank = fields.get("r", 8)
    if rank > RANKS[-1]:
        refused.append(f"rank {rank}, of at most {RANKS[-1]}")
    if refused:
        return [f"vLLM does not serve this adapter as it is ({', '.join(refused)}); --form merged does without."]
    least = next(each for each in RANKS if each >= rank)
    option = "" if least <= _DEFAULT_RANK else f" --max-lora-rank {least}"
    return [f"vLLM: --enable-lora{option} --lora-modules NAME={adapter.name}"]
