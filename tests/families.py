"""Tiny random models of the families that the fused loss is tried on; run it for the table in docs/distributed.md."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_OPT = {**_LLAMA, "word_embed_proj_dim": 32, "ffn_dim": 48}
_MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
_GLOBAL = [[["global"], 2]]
_HEADS = {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# name: (config class, its options). What stands after a comma is what is applied to the logits after the head's weight.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _LLAMA), "Llama, tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", _LLAMA), "Ministral": ("MinistralConfig", {**_LLAMA, "head_dim": 8}),
    "Mixtral": ("MixtralConfig", {**_LLAMA, **_EXPERTS}), "Qwen2": ("Qwen2Config", _LLAMA),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 48}),
    "Qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**_LLAMA, **_EXPERTS, "head_dim": 8}),
    "Gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 8}),
    "Gemma 2, soft-capped": ("Gemma2Config", {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "Gemma 3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8}),
    "Gemma 3, soft-capped": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "Cohere, scaled": ("CohereConfig", {**_LLAMA, "logit_scale": 0.25}),
    "Cohere 2, scaled": ("Cohere2Config", {**_LLAMA, "logit_scale": 0.25}),
    "Granite, scaled": ("GraniteConfig", {**_LLAMA, "logits_scaling": 4.0}),
    "Granite-MoE, scaled": ("GraniteMoeConfig", {**_LLAMA, **_EXPERTS, "logits_scaling": 4.0}),
    "Phi, with bias": ("PhiConfig", {**_LLAMA, **_HEADS}), "Phi-3": ("Phi3Config", {**_LLAMA, "pad_token_id": 0}),
    "OLMo 2": ("Olmo2Config", _LLAMA), "SmolLM 3": ("SmolLM3Config", {**_LLAMA, "pad_token_id": 0}),
    "StableLM": ("StableLmConfig", _LLAMA), "Starcoder 2": ("Starcoder2Config", _LLAMA),
    "GLM": ("GlmConfig", {**_LLAMA, "head_dim": 8, "pad_token_id": 0}), "EXAONE 4": ("Exaone4Config", _LLAMA),
    "Helium": ("HeliumConfig", {**_LLAMA, "head_dim": 8}), "Nemotron": ("NemotronConfig", _LLAMA),
    "HunYuan": ("HunYuanDenseV1Config", {**_LLAMA, "head_dim": 8, "pad_token_id": 0}), "GPT-2": ("GPT2Config", _GPT2),
    "GPT-Neo": ("GPTNeoConfig", {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": _GLOBAL}),
    "GPT-NeoX": ("GPTNeoXConfig", {**_LLAMA, "rotary_pct": 1.0}),
    "GPT-J, with bias": ("GPTJConfig", {**_GPT2, "rotary_dim": 8}), "GPT-BigCode": ("GPTBigCodeConfig", _GPT2),
    "OPT": ("OPTConfig", _OPT), "OPT, projected": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16}),
    "Bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "Mamba": ("MambaConfig", _MAMBA), "FalconMamba": ("FalconMambaConfig", _MAMBA),
    "RecurrentGemma": ("RecurrentGemmaConfig", {**_LLAMA, "lru_width": 32, "num_hidden_layers": 3, "head_dim": 8}),
    "Jamba": ("JambaConfig", {
        **_LLAMA, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    }),
    "LFM 2": ("Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "gpt-oss": ("GptOssConfig", {**_LLAMA, **_EXPERTS, "head_dim": 8}),
    "DeepSeek-V3": ("DeepseekV3Config", {
        **_LLAMA, **_HEADS, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    }),
    "BitNet": ("BitNetConfig", _LLAMA),
    "Llama 4": ("Llama4TextConfig", {**_LLAMA, **_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48}),
}  # fmt: skip


def build(family: str, vocab_size: int, attention: str | None = "eager", **changes: Any) -> PreTrainedModel:
    """A seeded random model of the family in float32, with weights large enough that its logits differ."""
    kind, options = FAMILIES[family]
    config = getattr(transformers, kind)(vocab_size=vocab_size, **options, **changes)
    if "pad_token_id" not in options:
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
    return model


def main() -> None:
    from quantkd.models.network import why_not_fusable

    print(f"transformers {transformers.__version__}\n\n| Family | Loss | Why |\n| --- | --- | --- |")
    for family in FAMILIES:
        reason = why_not_fusable(build(family, 320))
        print(f"| {family} | {'fused' if reason is None else 'logits'} | {reason or ''} |")


if __name__ == "__main__":
    main()
