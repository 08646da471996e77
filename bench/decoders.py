"""Small configurations over all decoders of mlx-lm: what a sweep takes apart, trains and samples.

Each is a name, whose first word is the model type, and what differs from `COMMON`. Fields that a
family does not know are ignored by mlx-lm.
"""

from typing import Any

COMMON: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 260},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5},
    **{"layernorm_epsilon": 1e-5, "norm_epsilon": 1e-5},
    **{"max_position_embeddings": 512, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    **{"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1},
    **{"shared_expert_intermediate_size": 16, "shared_intermediate_size": 16},
    **{"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "decoder_sparse_step": 1},
    **{"mlp_only_layers": [], "hidden_act": "silu", "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "sliding_window": 8},
    **{"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "n_positions": 512, "n_ctx": 512},
    **{"state_size": 4, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
    **{"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
    **{"residual_multiplier": 0.5, "use_qk_norm": True, "rope_scaling": None},
}
SLIDING_FULL = ["sliding_attention", "full_attention"]
ROPE_BY_TYPE = {kind: {"rope_theta": 1e4, "rope_type": "default"} for kind in SLIDING_FULL}
YARN = {
    **{"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
    **{"original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
MAMBA2 = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_d_conv": 4},
    **{"mamba_n_groups": 2, "mamba_proj_bias": False, "mamba_conv_bias": True},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 2},
}
GEMMA4 = {
    **{"model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": 0},
    **{"global_head_dim": 16, "hidden_size_per_layer_input": 0, "sliding_window_pattern": 2},
    **{"vocab_size_per_layer_input": 260, "use_double_wide_mlp": False},
    **{"tie_word_embeddings": True, "num_experts": None},
    "layer_types": SLIDING_FULL * 2,
}
GEMMA4_SHARED = GEMMA4 | {
    **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    "layer_types": SLIDING_FULL * 3,
}
GEMMA4_EXPERTS = GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
GEMMA3N = {
    "model_type": "gemma3n_text",
    **{"num_hidden_layers": 6, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 260},
    **{"rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0, "altup_num_inputs": 3},
    **{"activation_sparsity_pattern": [0.9] * 2 + [0.0] * 4, "hidden_size_per_layer_input": 8},
    **{"altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0},
    **{"laurel_rank": 4, "layer_types": SLIDING_FULL * 3},
}
MLA_MOE = {"num_key_value_heads": 4}
DSA = {
    **{"num_key_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
KIMI_LINEAR = {
    "linear_attn_config": {
        **{"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4},
        **{"kda_layers": [1], "full_attn_layers": [2]},
    },
    **{"model_max_length": 512, "num_key_value_heads": 4, "num_experts_per_token": 2},
}
QWEN3_5 = {
    **{"num_hidden_layers": 4, "full_attention_interval": 2, "num_experts": 0},
    "rope_parameters": {
        **{"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "mrope_section": [1, 1, 0],
    },
}
MINISTRAL3 = {"rope_parameters": YARN, "layer_types": SLIDING_FULL, "num_hidden_layers": 2}
LFM2 = {
    **{"conv_bias": False, "conv_L_cache": 3, "block_dim": 32, "block_multiple_of": 8},
    **{"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_ff_dim": 48},
    **{"full_attn_idxs": [1], "num_dense_layers": 1, "use_expert_bias": True},
    "layer_types": ["conv", "full_attention"],
}
LONGCAT = {
    **{"attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 48},
    **{"moe_topk": 2, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "num_layers": 2},
    **{"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
}
LLAMA4 = {
    **{"model_type": "llama4_text", "attention_chunk_size": 64, "interleave_moe_layer_step": 1},
    **{"intermediate_size_mlp": 48, "num_hidden_layers": 4, "num_experts_per_tok": 1},
}
VISION = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1}


def text(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model whose decoder's are nested."""
    return {"text_config": COMMON | config}


CONFIGS: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {
        **{"hidden_dim": 32, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4},
        **{"num_kv_heads": 2, "hidden_dim_scale_factor": 2.0},
    },
    "afmoe": {"layer_types": SLIDING_FULL, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2, "num_key_value_heads": 4},
    "bailing_moe": {},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2, "num_key_value_heads": 4},
    "bailing_moe_v3": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        **{"d_model": 32, "n_layers": 2, "n_heads": 4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek dense": {"n_routed_experts": None},
    "deepseek_v2": {**MLA_MOE, "rope_scaling": YARN, "topk_method": "greedy"},
    "deepseek_v3": MLA_MOE,
    "deepseek_v32": DSA,
    "deepseek_v41": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": SLIDING_FULL, "is_moe_layer": [False, True]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "num_hidden_layers": 2},
    "gear": {"layer_types": ["conv_mixer", "full_attention"]},
    "gemma": {},
    "gemma2": {},
    "gemma3": text({"model_type": "gemma3_text", "num_hidden_layers": 7}),
    "gemma3_text": {"num_hidden_layers": 7},
    "gemma3n": text(GEMMA3N),
    "gemma4": text(GEMMA4),
    "gemma4 shared": text(GEMMA4_SHARED),
    "gemma4 experts": text(GEMMA4_EXPERTS),
    "gemma4_text": GEMMA4,
    "gemma4_text shared": GEMMA4_SHARED,
    "gemma4_text k_eq_v": GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MLA_MOE,
    "glm_moe_dsa": DSA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_bigcode mqa": {"multi_query": True},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_neox sequential": {
        **{"rotary_emb_base": 10000, "rotary_pct": 0.5},
        "use_parallel_residual": False,
    },
    "gpt_oss": {"layer_types": SLIDING_FULL},
    "gptj": {"rotary_dim": 8, "activation_function": "gelu_new"},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"]},
    "granitemoehybrid dense": {
        **{**MAMBA2, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": None, "num_experts_per_tok": None},
    },
    "helium": {},
    "hunyuan": {
        **{"moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True},
        **{"use_cla": True, "cla_share_factor": 2, "num_hidden_layers": 4},
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan no sharing": {
        **{"moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True},
        **{"use_cla": False, "cla_share_factor": 2},
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 8},
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
        **{"expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 4, "mamba_expand": 2},
    },
    "kimi_k25": text(MLA_MOE),
    "kimi_k3": text(
        KIMI_LINEAR
        | {"hidden_act": "situ", "activation_situ_beta": 1.0, "activation_situ_linear_beta": 1.0}
        | {"attn_res_block_size": 2}
    ),
    "kimi_linear": KIMI_LINEAR,
    "kimi_vl": text(MLA_MOE),
    "laguna": {},
    "lfm2": LFM2,
    "lfm2-vl": text({"model_type": "lfm2", **LFM2}),
    "lfm2_moe": LFM2,
    "lille-130m": {"block_size": 512, "n_kv_heads": 2, "n_embd": 256, "n_head": 4},
    "llama": {},
    "llama sliding": {"layer_types": SLIDING_FULL},
    "llama tied": {"tie_word_embeddings": True},
    "llama4": text(LLAMA4),
    "llama4_text": {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 2, "emb_split_num": 2},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "time_step_limit": [0.0, 100.0]},
    "mellum": {"layer_types": SLIDING_FULL, "rope_parameters": ROPE_BY_TYPE},
    "mimo": {},
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "sliding_window_size": 8},
        **{"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False},
        **{"swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_head_dim": 8},
        **{"swa_num_key_value_heads": 2, "swa_v_head_dim": 8},
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {
        **{"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
        "rope_scaling": {
            **{"type": "longrope", "original_max_position_embeddings": 512},
            **{"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        },
    },
    "minimax": {"rotary_dim": 4},
    "minimax_m3_vl": text(
        {"dense_intermediate_size": 48, "rotary_dim": 4, "moe_layer_freq": [0, 1]}
    ),
    "ministral3": MINISTRAL3,
    "mistral3": text({"model_type": "ministral3", **MINISTRAL3}),
    "mistral3 of llama": text({"model_type": "llama"}),
    "mistral4": {**MLA_MOE, "rope_parameters": YARN, "rope_scaling": YARN},
    "mixtral": {},
    "muse_glimmer": {},
    "muse_spark": text(
        {"layer_types": SLIDING_FULL, "layer_rope_theta": [10000.0, 0.0], "num_shared_experts": 0}
        | {"rope_parameters": {"rope_theta": 10000.0}, "final_logit_softcapping": 30.0}
        | {"post_norm_eps": 1e-5, "output_multiplier": 1.0, "moe_hidden_size": 32}
    ),
    "nanbeige": {},
    "nanbeige loops": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
        ],
    },
    "nemotron_h": {**MAMBA2, "hybrid_override_pattern": list("M*-E"), "num_hidden_layers": 4}
    | {"moe_shared_expert_intermediate_size": 16},
    "nemotron_h dense": {**MAMBA2, "hybrid_override_pattern": list("M-*-"), "num_hidden_layers": 4},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING_FULL},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "olmoe": {},
    "openelm": {
        **{"num_transformer_layers": 2, "model_dim": 32, "ffn_dim_divisor": 8},
        **{"num_query_heads": [4, 4], "num_kv_heads": [2, 2], "ffn_multipliers": [1.0, 2.0]},
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    "phi3small": {
        **{"dense_attention_every_n_layers": 1, "ff_intermediate_size": 48, "gegelu_limit": 20.0},
        **{"vocab_size": 100352, "hidden_size": 16},  # it has tokens of its own up to 100,351
    },
    "phimoe": {
        "rope_scaling": {
            **{"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
            **{"short_mscale": 1.0, "long_mscale": 1.0},
        }
    },
    "phixtral": {
        **{"n_vocab": 260, "num_vocab": 260, "model_dim": 32, "num_heads": 4, "num_layers": 2},
        **{"rotary_dim": 4, "num_experts_per_tok": 2, "num_local_experts": 4},
    },
    "pixtral": text({"model_type": "llama"}),
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        **{"hidden_size_per_head": 8, "mamba_d_state": 4, "mamba_d_conv": 4},
        **{"mamba_num_heads": 4, "mamba_step": 2, "attention_window_size": 512},
    },
    "plamo3": {"sliding_window_pattern": 2, "window_size": 8},
    "qwen": {"kv_channels": 8},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": text({"model_type": "qwen2"}),
    "qwen3": {},
    "qwen3_5": text(QWEN3_5),
    "qwen3_5_moe": text(QWEN3_5 | {"num_experts": 4}),
    "qwen3_moe": {},
    "qwen3_next": {"num_hidden_layers": 4, "full_attention_interval": 2},
    "qwen3_vl": text({"model_type": "qwen3"}),
    "qwen3_vl_moe": text({"model_type": "qwen3_moe"}),
    "recurrent_gemma": {
        **{"conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 8},
        **{"num_hidden_layers": 3, "num_key_value_heads": 1},
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        **{"a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4},
        "decay_low_rank_dim": 4,
    },
    "seed_oss": {},
    "smollm3": {"num_hidden_layers": 4},
    "solar_open": {},
    "spark2_5": {"layer_types": SLIDING_FULL, "rope_parameters": ROPE_BY_TYPE}
    | {"hidden_act": "gelu"},
    "stablelm": {"use_qkv_bias": True},
    "stablelm parallel": {"use_qkv_bias": False, "use_parallel_residual": True}
    | {"qk_layernorm": True},
    "starcoder2": {},
    "step3p5": {
        **{"num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2},
        **{"share_expert_dim": 16, "layer_types": SLIDING_FULL, "moe_layers_enum": "1"},
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {"num_key_value_heads": 4},
}


def decoder_config(name: str) -> dict[str, Any]:
    """config.json of one of them."""
    return COMMON | {"model_type": name.split()[0]} | CONFIGS[name]
