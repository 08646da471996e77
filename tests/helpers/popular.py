"""Popular families beyond the plain decoder, in the classes of transformers: hybrids, mixtures,
shared keys and values. Small, and written as `variants.write_variant` writes them."""

from tests.helpers.variants import (
    EYES,
    MOE,
    MULTIPLIERS,
    SHAPE,
    VARIANTS,
    Variant,
    nested,
    rope,
)

DELTA = {
    **{"head_dim": 16, "num_hidden_layers": 4},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
DELTA_MOE = {
    **{**DELTA, "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
SEEING = {
    "vision_config": {
        **{**EYES, "out_hidden_size": 64, "patch_size": 14},
        "deepstack_visual_indexes": [0],
    },
    "tie_word_embeddings": False,
}
GEMMA4 = {
    **{"head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4, "sliding_window": 8},
    **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
    **{"vocab_size_per_layer_input": SHAPE["vocab_size"]},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SHARED = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {
    **{"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1},
    **{"mamba_expand": 2, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
}
FALCON = {
    **{"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 1},
}
NEMOTRON = {
    **{"head_dim": 16, "num_hidden_layers": 4, "n_groups": 2, "ssm_state_size": 8},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "moe_shared_expert_intermediate_size": 32,
    "layers_block_type": ["mamba", "attention", "moe", "mamba"],
}
MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2}
POPULAR: dict[str, Variant] = {
    "qwen3_5": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5 multimodal": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": nested(DELTA), **SEEING},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", DELTA_MOE),
    "qwen3_5_moe multimodal": (
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": nested(DELTA_MOE), **SEEING},
    ),
    # mlx-lm computes this form of GELU whatever the source has
    "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 256, "hidden_act": "gelu_new"}),
    "qwen3_next": VARIANTS["qwen3_next"],
    "qwen3_moe": VARIANTS["qwen3_moe"],
    "lfm2": (
        "Lfm2ForCausalLM",
        {
            **{"num_hidden_layers": 4, "full_attn_idxs": [1, 3]},
            **{"block_auto_adjust_ff_dim": False, "block_ff_dim": 64, "block_dim": 64},
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {
            **{"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, **MOE},
            "num_dense_layers": 1,
        },
    ),
    "gemma4": ("Gemma4ForCausalLM", GEMMA4),
    "gemma4 shared": ("Gemma4ForCausalLM", {**GEMMA4, **SHARED}),
    "gemma4 experts": (
        "Gemma4ForCausalLM",
        {
            **{**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            "moe_intermediate_size": 32,
        },
    ),
    "gemma4 multimodal": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**SHAPE, **GEMMA4, **SHARED},
            **{"vision_config": None, "audio_config": None},
        },
    ),
    "ministral3": VARIANTS["ministral3"],
    "gpt_oss": ("GptOssForCausalLM", dict(sliding_window=8, head_dim=16, **EXPERTS, **rope())),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {**GRANITE, **EXPERTS, **MULTIPLIERS}),
    "falcon_h1": ("FalconH1ForCausalLM", FALCON),
    "falcon_h1 two groups": ("FalconH1ForCausalLM", {**FALCON, "mamba_n_groups": 2}),
    "nemotron_h": ("NemotronHForCausalLM", NEMOTRON),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "olmo3": VARIANTS["olmo3"],
    "smollm3": VARIANTS["smollm3"],
    "gpt2": VARIANTS["gpt2"],
    "afmoe": (
        "AfmoeForCausalLM",
        {
            **{"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 8, **MOE},
            "num_dense_layers": 1,
        },
    ),
}
GROUPED: dict[str, Variant] = {
    "mamba2": ("Mamba2ForCausalLM", {**MAMBA2, "n_groups": 2}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**GRANITE, **EXPERTS, **MULTIPLIERS, "mamba_n_groups": 2},
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        {**FALCON, "mamba_n_groups": 2, "mamba_rms_norm": True},
    ),
}
"""State spaces of several groups, which mlx-lm computes differently."""
