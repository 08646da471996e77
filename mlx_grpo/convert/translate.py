"""config.json of transformers in the words of mlx-lm.

Three things go wrong without a word where a configuration is taken as it is: a field that
config.json leaves out has another default in mlx-lm, it has another name there, or it stands in a
table that mlx-lm does not read.
"""

import math
from typing import Any

from mlx_grpo.convert.families import Family, canonical, mlx_family, text_family
from mlx_grpo.models.directory import EXACT_UP_TO, rope_fields

LAYER_NAMES = {
    "granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"},
}
"""Kinds of layers that transformers 5 renamed and mlx-lm calls as before."""

TEXT_ALONE = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Text parts of multimodal families that are stored alone, which mlx-lm knows as a part only."""

NONE_MEANS = {"position_embedding_type": "nope"}
"""Where transformers' default is None and mlx-lm's is not."""


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as mlx-lm has to read it to compute what transformers computes.

    Translating it again changes nothing.
    """
    if whole := TEXT_ALONE.get(str(config.get("model_type"))):
        config = {**config, "model_type": whole, "text_config": config}
    family = mlx_family(config)
    return _translated(config, family) if family else config | rope_fields(config)


def _translated(config: dict[str, Any], family: Family) -> dict[str, Any]:
    known = canonical(config)
    text = config.get("text_config")
    if isinstance(text, dict) and family.takes("text_config"):
        named = getattr(getattr(known, "text_config", None), "model_type", "")
        kind = str(text.get("model_type") or named)
        inner = {**text, "model_type": kind} if kind else text
        ties = {n: config[n] for n in ("tie_word_embeddings",) if n in config}
        inner = _translated(inner | ties, text_family(family, kind))
        config = {**config, "text_config": inner}
        if family.takes("vocab_size") and "vocab_size" in inner:
            config = {"vocab_size": inner["vocab_size"], **config}
    elif known is not None:
        config = {**config, **_left_out(config, known, family)}
    else:
        config = config | rope_fields(config)
    return _with_short_rope(_with_windows(config, known, family))


def _left_out(config: dict[str, Any], known: Any, family: Family) -> dict[str, Any]:
    """Fields of mlx-lm's arguments that config.json does not give and transformers has."""
    rope = getattr(known, "rope_parameters", None) or {}
    found = rope_fields({**config, "rope_parameters": rope})
    main = rope.get("full_attention") or rope
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    found |= {old: main[new] for old, new in older.items() if family.takes(old) and new in main}
    for name in family.args.__dataclass_fields__:
        derived = isinstance(getattr(type(known), name, None), property)
        if name in found or config.get(name) is not None or name.startswith("rope_") or derived:
            continue
        value = getattr(known, name, NONE_MEANS.get(name))
        value = NONE_MEANS.get(name) if value is None else value
        if name == "head_dim" and value is None and family.needs(name):
            value = known.hidden_size // known.num_attention_heads
        if value is not None or family.needs(name):
            found[name] = value
    if family.takes("global_head_dim") and (widths := _widths_of_full_attention(known)):
        found["global_head_dim"] = widths.pop()
    needed = {n: None for n in ("rope_scaling",) if family.needs(n) and n not in config}
    return {**needed, **found}


def _widths_of_full_attention(known: Any) -> set[int]:
    """Of a head, where transformers 5 gives them layer by layer."""
    own = known.to_dict().get("per_layer_config") or {}
    return {part["head_dim"] for part in own.values() if "head_dim" in part}


def _with_windows(config: dict[str, Any], known: Any, family: Family) -> dict[str, Any]:
    """Which layers see a window of tokens only, as mlx-lm is told."""
    layers = getattr(known, "layer_types", None)
    names = LAYER_NAMES.get(str(config.get("model_type")))
    if names and isinstance(config.get("layer_types"), list):
        return {**config, "layer_types": [names.get(k, k) for k in config["layer_types"]]}
    if layers and family.uses("sliding_window_pattern") and not family.uses("layer_types"):
        if "str" in str(family.args.__dataclass_fields__["sliding_window_pattern"].type):
            letters = ["L" if kind == "sliding_attention" else "G" for kind in layers]
            return {**config, "sliding_window_pattern": "".join(letters)}
        period = next((p for p in range(1, len(layers) + 2) if layers == _periodic(p, layers)), 0)
        return {**config, "sliding_window_pattern": period} if period else config
    return config


def _periodic(period: int, layers: list[str]) -> list[str]:
    kinds = ("sliding_attention", "full_attention")
    return [kinds[i % period == period - 1] for i in range(len(layers))]


def _yarn(scaling: dict[str, Any]) -> dict[str, Any]:
    """transformers takes `mscale` only beside `mscale_all_dim`, and neither beside a factor."""
    factor = scaling.get("attention_factor")
    if not factor and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scaling
    rest = {n: v for n, v in scaling.items() if n not in ("mscale", "mscale_all_dim")}
    if not factor or scaling["factor"] <= 1:
        return rest
    return {**rest, "mscale": (factor - 1) / (0.1 * math.log(scaling["factor"]))}


def _with_short_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Scaled rotary embeddings with the factors that hold for the lengths of a training run.

    longrope has factors for short texts and for long ones; mlx-lm always takes the long ones.
    yarn's `attention_factor` is `mscale` in mlx-lm.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return config
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "yarn":
        return {**config, "rope_scaling": _yarn(scaling)}
    if kind not in ("longrope", "su") or "short_factor" not in scaling:
        return config
    original = scaling.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    if not original:
        return config
    short = {**scaling, "long_factor": scaling["short_factor"]}
    short["original_max_position_embeddings"] = original
    if "short_mscale" in scaling:
        short["long_mscale"] = scaling["short_mscale"]
    # mlx-lm derives the scale of attention from this ratio, transformers from `factor`
    most = round(original * scaling["factor"]) if scaling.get("factor") else None
    if scaling.get("attention_factor"):
        most = round(original ** (scaling["attention_factor"] ** 2))
    different = scaling["long_factor"] != scaling["short_factor"]
    return {
        **config,
        "rope_scaling": short,
        **({"max_position_embeddings": most} if most else {}),
        **({EXACT_UP_TO: original} if different else {}),
    }
