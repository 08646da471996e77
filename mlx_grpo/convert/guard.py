"""Fields of a configuration that mlx-lm does not compute, found without running the model.

Each field that transformers knows, that differs from its default, and that mlx-lm's arguments drop
or its code never reads, is one of three: without effect on the numbers, a computation that is
missing, or unknown to this list.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlx.utils import tree_flatten

from mlx_grpo.convert.families import Family, canonical, differing, mlx_family, text_family
from mlx_grpo.convert.reader import OpenedSource
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.directory import EXACT_UP_TO

SHORT = 1024
"""Tokens; a model that is only correct below this is useless for training."""
GELUS = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"}
SILUS = {"silu", "swish"}
SAME = (GELUS, SILUS)
"""Activations that differ by rounding, or 5e-4 at the most: GELU and its form by tanh."""
COMPUTED = {
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "alibi",
    "attention_multiplier",
    "attn_logit_softcapping",
    "attn_temperature_tuning",
    "clip_qkv",
    "decoder_sparse_step",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "mlp_only_layers",
    "moe_layer_freq",
    "no_rope_layers",
    "norm_topk_prob",
    "parallel_attn",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "routed_scaling_factor",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "scoring_func",
    "topk_method",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "use_qk_norm",
}
"""Change every number a model computes."""
INERT = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "classifier_dropout", "dtype", "eos_token_id", "id2label", "image_token_id",
    "image_token_index", "initializer_range", "is_decoder", "label2id", "layer_types",
    "max_position_embeddings",
    "max_window_layers", "model_type", "n_positions", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "rope_parameters", "rope_scaling", "router_aux_loss_coef",
    "router_jitter_noise", "sep_token_id", "sliding_window", "text_config", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "use_sliding_window",
    "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id",
    "vocab_size", "original_max_position_embeddings", "audio_config", "is_encoder_decoder",
}  # fmt: skip
"""Say nothing about the numbers of a text, or are looked at below."""
LOST = "e_score_correction_bias"
"""Chooses the experts of a token."""
GROUPS = {
    "mamba2": "n_groups",
    "granitemoehybrid": "mamba_n_groups",
    "falcon_h1": "mamba_n_groups",
}
"""Of a state space, where mlx-lm takes the norm behind it over all groups together."""
SIZES = ("_size", "_dim", "_rank", "_bias", "_eps", "dropout", "_pdrop", "num_", "n_", "_layers")
"""Parts of names whose effect is in the shapes of the tensors, which are checked, or in none."""
ROPE_READ = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor", "attention_factor", "short_mscale", "long_mscale"},
    "proportional": {"partial_rotary_factor"},
}
ROPE_KNOWN = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "partial_rotary_factor", "mrope_section", "mrope_interleaved", "max_position_embeddings",
    "llama_4_scaling_beta",
}  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What a configuration asks for and mlx-lm does not compute."""

    missing: tuple[str, ...] = ()
    """`field value` of what changes every number."""
    unknown: tuple[str, ...] = ()
    """`field value` of what may change them."""
    exact_up_to: int | None = None
    """Tokens up to which mlx-lm computes what the source does; None for no limit."""

    def notes(self, compared: bool) -> Iterator[str]:
        """What to tell; unknown fields only where no comparison has settled the question."""
        if self.missing:
            missing = ", ".join(self.missing)
            yield f"another model than the source: mlx-lm does not compute {missing}"
        if self.exact_up_to:
            yield (
                f"the same model as the source for texts of up to {self.exact_up_to} tokens; "
                "beyond that mlx-lm computes its sliding_window or rope_scaling differently"
            )
        if self.unknown and not compared:
            yield (
                f"mlx-lm does not read {', '.join(self.unknown)}; pip install 'mlx-grpo[verify]' "
                "and convert again to compare with PyTorch"
            )


def check_source(opened: OpenedSource, allow_mismatch: bool) -> Findings:
    """Look at what mlx-lm does not compute of a source.

    Raises:
        InputError: the model that mlx-lm builds would be another one, and nobody allowed it.
    """
    base = opened.base
    if base.kind != "model":
        return Findings()
    found, place = findings(base.config, opened.config), base.path / "config.json"
    names = (name for name, _ in tree_flatten(opened.backbone().parameters()))
    if lost := lost_tensor(opened.tensors().arrays, names):
        found = replace(found, missing=(*found.missing, f"tensor '{lost}'"))
    if found.missing and not allow_mismatch:
        raise InputError(
            f"{place}: mlx-lm does not compute {' and '.join(found.missing)} for "
            f"{base.config.get('model_type')}, so the result would be another model; "
            "--allow-mismatch converts it anyway"
        )
    if found.exact_up_to and found.exact_up_to < SHORT and not allow_mismatch:
        raise InputError(
            f"{place}: mlx-lm computes this model correctly for texts of up to {found.exact_up_to} "
            "tokens only (sliding_window, rope_scaling); --allow-mismatch converts it anyway"
        )
    return found


def findings(config: dict[str, Any], translated: dict[str, Any]) -> Findings:
    """The fields of a configuration that mlx-lm drops or never reads, sorted by what they do."""
    family, known = mlx_family(translated), canonical(config)
    if family is None or known is None:
        return Findings()
    text = translated.get("text_config")
    if isinstance(text, dict) and hasattr(known, "text_config"):
        family = text_family(family, str(text.get("model_type")))
        known, translated = known.text_config, text
    missing = [*_rope(known, translated, family), *_groups(known), *_unfolded(known, family)]
    unknown = []
    for name, value in differing(known):
        if name in INERT or _read(name, known, family):
            continue
        if name in COMPUTED:
            if not _same_activation(value, getattr(type(known)(), name, None)):
                missing.append(f"{name} {value!r}")
        elif not any(part in name for part in SIZES):
            unknown.append(f"{name} {value!r}"[:80])
    layers, pattern = getattr(known, "layer_types", None), _layers(translated, family)
    if layers and pattern is not None and layers != pattern:
        missing.append("layer_types in this order")
    limits = [n for n in (translated.get(EXACT_UP_TO), _window(known, translated, family)) if n]
    return Findings(tuple(missing), tuple(unknown), min(limits, default=None))


def lost_tensor(arrays: Iterable[str], parameters: Iterable[str]) -> str | None:
    """A tensor that takes part in the computation and that mlx-lm's loader of a family drops."""
    if any(LOST in name for name in parameters):
        return None
    return next((name for name in arrays if LOST in name), None)


def _read(name: str, known: Any, family: Family) -> bool:
    """Whether mlx-lm reads a field, under the name transformers stores or another one for it."""
    others = (old for old, new in (known.attribute_map or {}).items() if new == name)
    return any(family.uses(n) for n in (name, *others))


def _same_activation(value: Any, usual: Any) -> bool:
    return any(value in same and usual in same for same in SAME if isinstance(value, str))


def _layers(translated: dict[str, Any], family: Family) -> list[str] | None:
    """The kinds of layers that mlx-lm makes of a period, where it knows no list of them."""
    period = translated.get("sliding_window_pattern")
    if family.uses("layer_types") or not family.uses("sliding_window_pattern"):
        return None
    if not isinstance(period, int) or not period:
        return None
    count = translated["num_hidden_layers"]
    return [f"{'full' if i % period == period - 1 else 'sliding'}_attention" for i in range(count)]


def _window(known: Any, translated: dict[str, Any], family: Family) -> int | None:
    """The window of a model whose layers mlx-lm lets see everything."""
    window, layers = getattr(known, "sliding_window", None), getattr(known, "layer_types", None)
    if not window or getattr(known, "use_sliding_window", True) is False:
        return None
    if layers and "sliding_attention" not in layers:
        return None
    told = translated.get("layer_types") or not family.uses("layer_types")
    return None if family.uses("sliding_window") and told else int(window)


def _rope(known: Any, translated: dict[str, Any], family: Family) -> Iterator[str]:
    """Rotary settings that mlx-lm does not read."""
    rope = getattr(known, "rope_parameters", None) or {}
    main = rope.get("full_attention") or rope
    scaling = {**main, **(translated.get("rope_scaling") or {})}
    kind = main.get("rope_type", "default")
    if kind != "default" and not family.mentions("rope_scaling", "rope_parameters"):
        yield f"rope_type {kind!r}"
    names = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_dim")
    if main.get("partial_rotary_factor", 1) != 1 and not family.mentions(*names):
        yield f"partial_rotary_factor {main['partial_rotary_factor']}"
    read = ROPE_KNOWN | ROPE_READ.get(kind, set())
    for name, value in scaling.items():
        if name not in read and value not in (None, _usual(name)) and not isinstance(value, dict):
            yield f"{name} {value!r} of rope_type {kind!r}"


def _groups(known: Any) -> Iterator[str]:
    """Groups of a state space with a norm each."""
    name = GROUPS.get(str(getattr(known, "model_type", "")), "")
    count = getattr(known, name, 1) if getattr(known, "mamba_rms_norm", True) else 1
    if count != 1:
        yield f"{name} {count}"


def _unfolded(known: Any, family: Family) -> Iterator[str]:
    """A multiplier that mlx-lm's falcon_h1 folds into tensors of a name that no tensor has."""
    factor = getattr(known, "key_multiplier", 1)
    if factor != 1 and '"key_proj.weight"' in family.code:
        yield f"key_multiplier {factor}"


def _usual(name: str) -> Any:
    return {"truncate": True, "mscale": 1.0}.get(name)
