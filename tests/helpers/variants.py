"""Architectures and settings of transformers that a sweep converts: class and changes by name."""

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.tiny import BOS, EOS, PAD, VOCABULARY, write_tokenizer

Variant = tuple[str, dict[str, Any]]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def rope(kind: str = "default", theta: float = 1e4, **more: Any) -> dict[str, Any]:
    """Rotary settings as transformers 5 has them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 4.0 * i for i in range(8)],
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
MULTIPLIERS = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
VARIANTS: dict[str, Variant] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama theta 5e5": ("LlamaForCausalLM", rope(theta=5e5)),
    "llama linear": ("LlamaForCausalLM", rope("linear", factor=4.0)),
    "llama dynamic": ("LlamaForCausalLM", rope("dynamic", factor=4.0)),
    "llama yarn": ("LlamaForCausalLM", rope("yarn", **YARN)),
    "llama yarn attention_factor": ("LlamaForCausalLM", rope("yarn", attention_factor=1.5, **YARN)),
    "llama yarn beta": ("LlamaForCausalLM", rope("yarn", beta_fast=16, beta_slow=2, **YARN)),
    "llama yarn truncate": ("LlamaForCausalLM", rope("yarn", truncate=False, **YARN)),
    "llama llama3": ("LlamaForCausalLM", rope("llama3", **LLAMA3)),
    "llama longrope": ("LlamaForCausalLM", rope("longrope", **LONG)),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim 32": ("LlamaForCausalLM", {"head_dim": 32}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama eps": ("LlamaForCausalLM", {"rms_norm_eps": 1e-3}),
    "llama gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 8}),
    "mistral wide window": ("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2 yarn": ("Qwen2ForCausalLM", rope("yarn", **YARN)),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3 window": (
        "Qwen3ForCausalLM",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen3 bias": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma2 window": (
        "Gemma2ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "gemma2 no softcap": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 8},
    ),
    "gemma3_text linear": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3_text layer_types": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "gemma3_text softcap": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "num_hidden_layers": 6, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text bidirectional": (
        "Gemma3ForCausalLM",
        {"head_dim": 16, "num_hidden_layers": 6, "use_bidirectional_attention": True},
    ),
    "phi": ("PhiForCausalLM", {}),
    "phi partial": ("PhiForCausalLM", rope(partial_rotary_factor=0.25)),
    "phi qk_layernorm": ("PhiForCausalLM", {"qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3 window": ("Phi3ForCausalLM", {"sliding_window": 8}),
    "phi3 longrope": (
        "Phi3ForCausalLM",
        dict(original_max_position_embeddings=128, **rope("longrope", **LONG)),
    ),
    "phi3 longrope, long": (
        "Phi3ForCausalLM",
        dict(
            max_position_embeddings=16384,
            original_max_position_embeddings=2048,
            **rope("longrope", **{**LONG, "original_max_position_embeddings": 2048}),
        ),
    ),
    "phi3 longrope, attention_factor": (
        "Phi3ForCausalLM",
        dict(
            max_position_embeddings=16384,
            original_max_position_embeddings=2048,
            **rope(
                "longrope",
                attention_factor=1.3,
                **{**LONG, "original_max_position_embeddings": 2048},
            ),
        ),
    ),
    "phi3 partial": ("Phi3ForCausalLM", rope(partial_rotary_factor=0.5)),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral window": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", dict(shared_expert_intermediate_size=32, **MOE)),
    "qwen2_moe norm_topk": (
        "Qwen2MoeForCausalLM",
        dict(shared_expert_intermediate_size=32, norm_topk_prob=True, **MOE),
    ),
    "qwen2_moe mlp_only": (
        "Qwen2MoeForCausalLM",
        dict(shared_expert_intermediate_size=32, mlp_only_layers=[0], **MOE),
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(head_dim=16, **MOE)),
    "qwen3_moe norm_topk": ("Qwen3MoeForCausalLM", dict(head_dim=16, norm_topk_prob=True, **MOE)),
    "qwen3_moe window": (
        "Qwen3MoeForCausalLM",
        dict(head_dim=16, use_sliding_window=True, sliding_window=8, max_window_layers=0, **MOE),
    ),
    "granite": (
        "GraniteForCausalLM",
        MULTIPLIERS,
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, **MULTIPLIERS},
    ),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo clip_qkv": ("OlmoForCausalLM", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 8, "num_hidden_layers": 4}),
    "olmo3 yarn": (
        "Olmo3ForCausalLM",
        dict(sliding_window=8, num_hidden_layers=4, **rope("yarn", **YARN)),
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe norm_topk": (
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "olmoe clip_qkv": (
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    ),
    "stablelm": ("StableLmForCausalLM", {}),
    "stablelm parallel qk_norm": (
        "StableLmForCausalLM",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "stablelm qkv_bias": ("StableLmForCausalLM", {"use_qkv_bias": True}),
    "stablelm partial": ("StableLmForCausalLM", rope(partial_rotary_factor=0.5)),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "starcoder2 window": ("Starcoder2ForCausalLM", {"sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    "gpt2 inverse layer idx": (
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 256,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 256}),
    "gpt_neox theta": (
        "GPTNeoXForCausalLM",
        dict(intermediate_size=256, **rope(theta=5e4, partial_rotary_factor=0.5)),
    ),
    "gpt_neox sequential": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "gpt_neox partial": ("GPTNeoXForCausalLM", rope(partial_rotary_factor=0.5)),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256, "rotary_dim": 8},
    ),
    "gpt_bigcode": (
        "GPTBigCodeForCausalLM",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    ),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "cohere qk_norm": ("CohereForCausalLM", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 8, "num_hidden_layers": 4}),
    "glm": ("GlmForCausalLM", {"head_dim": 16}),
    "glm partial 1": ("GlmForCausalLM", dict(head_dim=16, **rope(partial_rotary_factor=1.0))),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16}),
    "exaone4": ("Exaone4ForCausalLM", {"sliding_window": 8, "num_hidden_layers": 4}),
    "helium": ("HeliumForCausalLM", {"head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "smollm3 window": (
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8},
    ),
    "ernie4_5": ("Ernie4_5ForCausalLM", {"head_dim": 16}),
    "ernie4_5 bias": ("Ernie4_5ForCausalLM", {"head_dim": 16, "use_bias": True}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 16}),
    "nemotron": ("NemotronForCausalLM", {}),
    "apertus": ("ApertusForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
        },
    ),
    "hunyuan_dense": ("HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 16}),
    "bitnet": ("BitNetForCausalLM", {}),
    "dots1": (
        "Dots1ForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": 16,
        },
    ),
    "nanochat": ("NanoChatForCausalLM", {}),
    "minimax": ("MiniMaxForCausalLM", {"num_local_experts": 4}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {"num_local_experts": 0, "layer_types": ["attention"] * 2, "shared_intermediate_size": 64},
    ),
    "falcon_h1": ("FalconH1ForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3, "lru_width": 64}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        dict(
            head_dim=16,
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=32,
            **MOE,
        ),
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 64},
    ),
    "arcee": ("ArceeForCausalLM", {}),
    "jamba": (
        "JambaForCausalLM",
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "opt": ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {"n_head": 4, "n_layer": 2}),
    "vaultgemma": ("VaultGemmaForCausalLM", {"head_dim": 16}),
}


def nested(text: dict[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal model, with its rotary settings in it."""
    return {**SHAPE, "head_dim": 16, **text}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": 8}
QWEN3_VL = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
MULTIMODAL: dict[str, Variant] = {
    "gemma3 multimodal": (
        "Gemma3ForConditionalGeneration",
        {"text_config": nested(GEMMA3), "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "gemma3 multimodal, linear rope": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": nested({**GEMMA3, "rope_parameters": LINEAR}),
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3, theta 1e9": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**nested(rope(theta=1e9)), "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl, theta 5e6": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": nested(rope(theta=5e6, **QWEN3_VL)),
            "vision_config": {
                **EYES,
                "out_hidden_size": 64,
                "patch_size": 14,
                "deepstack_visual_indexes": [0],
            },
            "tie_word_embeddings": False,
        },
    ),
}
VARIANTS |= MULTIMODAL


def write_variant(directory: Path, variant: Variant) -> Any:
    """Write a random model in bf16 whose attention depends on positions; return it."""
    name, changes = variant
    model_class = getattr(transformers, name)
    shape = {} if "text_config" in changes else SHAPE
    with torch.random.fork_rng(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        config = model_class.config_class(**{**shape, **changes})
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        for parameter_name, value in model.named_parameters():
            value += 0.1 * torch.randn(value.shape)
            if "q_proj" in parameter_name or "k_proj" in parameter_name:
                value *= 3
            if value.ndim == 1:  # mlx-lm stores 1 + w of some norms: exact in steps of 1/64
                value.copy_((64 * value).round() / 64)
            value.copy_(value.bfloat16())
        copy.deepcopy(model).bfloat16().save_pretrained(directory)
    write_tokenizer(directory)
    return model
