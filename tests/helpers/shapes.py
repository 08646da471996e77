"""Shapes that planning is tested with."""

from mlx_grpo.models.decoder import Sizes
from mlx_grpo.plan.footprint import Footprint
from mlx_grpo.plan.memory import Choice, Workload

GEMMA_2B = Footprint(
    parameters=2_506_172_416,
    packed_bytes=1_409_830_912,
    scale_values=16_384_000,
    all_scale_values=78_315_520,
    blocks=18,
    hidden=2048,
    mlp=16384,
    attention=2560,
    heads=8,
    vocabulary=256_000,
    block_weights=1_981_808_640,
    lora_width=1_225_728,
    cache_values=9216,
    embedding_bytes=294_912_000,
)
WORK = Workload(16, 6, 256, 256, 16, steps=4)
PACKED = Choice(dense=False, value_bytes=2, decode_rows=0, sizes=Sizes())
