"""What mlx-lm does not compute of a source is found in its configuration."""

from typing import Any

import pytest

from mlx_grpo.convert.guard import findings
from mlx_grpo.convert.translate import translated
from tests.helpers.popular import FALCON

CONFIG: dict[str, Any] = {
    "model_type": "falcon_h1",
    "architectures": ["FalconH1ForCausalLM"],
    **FALCON,
}


@pytest.mark.parametrize(("multiplier", "missing"), [(1.0, ()), (0.39, ("key_multiplier 0.39",))])
def test_a_multiplier_that_is_folded_into_no_tensor_is_missing(
    multiplier: float, missing: tuple[str, ...]
) -> None:
    config = {**CONFIG, "key_multiplier": multiplier}
    assert findings(config, translated(config)).missing == missing
