"""A reward model of its own that is not kept: for each scoring its blocks are read from its files
one after the other, run over all completions, and let go.

At no time is more of it in memory than its embedding or one block, so that the policy's weights
can stay where they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_grpo.backend.precision import Precision, apply_precision
from mlx_grpo.core.padding import length_buckets, pad_right
from mlx_grpo.core.stopping import SafePoint, never_stop
from mlx_grpo.core.types import Group
from mlx_grpo.files.manifest import verify_manifest
from mlx_grpo.models.block_reader import Rows, cast_around_blocks, embed_rows, run_blocks
from mlx_grpo.models.check import check_streamed
from mlx_grpo.models.decoder import Decoder, Sizes
from mlx_grpo.models.directory import Stamps, load_lazily, load_unchanged, weight_stamps
from mlx_grpo.models.reward_model import (
    REWARD_HEAD,
    FirstLayer,
    TextForm,
    input_tokenizer,
    load_head,
    reward_config,
    reward_decoder,
    reward_head,
    reward_inputs,
)


@dataclass(frozen=True)
class _Bucket:
    """Rows of similar length of one group."""

    group: int
    places: list[int]
    """Which completions of the group."""
    lengths: list[int]
    rows: Rows


@dataclass(frozen=True)
class StreamedRewardModel:
    """Scores completions as `RewardModel` does, from files."""

    path: Path
    stamps: Stamps
    precision: Precision
    sizes: Sizes
    hidden_bytes: int
    """Of hidden states worked on at a time: the blocks are read once for as many groups."""
    weight_1D: mx.array
    bias: mx.array | None
    tokenizer: Any | None
    form: TextForm = field(default_factory=TextForm)
    first: FirstLayer | None = None

    def score(self, group: Group) -> list[float]:
        """Raw scores of the completions of a group."""
        return self.score_groups([group])[0]

    def score_groups(
        self, groups: Sequence[Group], safe_point: SafePoint = never_stop
    ) -> list[list[float]]:
        """Raw scores of the completions of each group."""
        scores = [[0.0] * len(group.completions) for group in groups]
        for buckets in self._waves(groups):
            safe_point()
            for b, found in zip(buckets, self._run(buckets), strict=True):
                for place, score in zip(b.places, found, strict=True):
                    scores[b.group][place] = score
        return scores

    def _waves(self, groups: Sequence[Group]) -> Iterator[list[_Bucket]]:
        """Embedded rows of as many groups as may be in memory together."""
        wave: list[_Bucket] = []
        for i, group in enumerate(groups):
            wave += self._embedded(i, group)
            held = sum(h.nbytes for b in wave for h in b.rows.states)
            if 2 * held > self.hidden_bytes:
                yield wave
                wave = []
        if wave:
            yield wave

    def _embedded(self, index: int, group: Group) -> Iterator[_Bucket]:
        decoder = self.opened()  # anew: what is read of the embedding goes with it
        prompt, rows = reward_inputs(group, self.tokenizer, self.form)
        for bucket in length_buckets(list(map(len, rows)), len(prompt), self.sizes.rows):
            rows_KT, lengths = pad_right([rows[i] for i in bucket])
            entered = embed_rows(decoder, mx.array([prompt]), rows_KT)
            yield _Bucket(index, bucket, lengths, entered)

    def _run(self, buckets: Sequence[_Bucket]) -> Iterator[list[float]]:
        decoder = self.opened()
        run_blocks(decoder, [b.rows for b in buckets], self.precision)
        for b in buckets:
            last_KD = b.rows.states[1][mx.arange(len(b.lengths)), mx.array(b.lengths) - 1]
            yield reward_head(decoder, last_KD, self.weight_1D, self.bias, self.first).tolist()

    def opened(self) -> Decoder:
        """The model with nothing read yet."""
        model = load_unchanged(self.path, self.stamps)
        model.freeze()
        model.eval()
        decoder = Decoder(model, self.sizes)
        if self.precision.dense:  # the embedding stays packed all the same
            return cast_around_blocks(decoder, self.precision.dtype)
        with decoder.without_blocks():
            apply_precision(model, self.precision)
        return decoder


def open_streamed(
    path: Path, precision: Precision, sizes: Sizes, hidden_bytes: int, date: str = ""
) -> StreamedRewardModel:
    """A reward model of kind `full` that stays on disk; its files are checked here, once.

    Raises:
        InputError: missing or damaged files, a model without a final norm for a head to read, or
            one that does not compute the same when it is taken apart.
    """
    config, stamps = reward_config(path), weight_stamps(path)
    verify_manifest(path)
    hidden = reward_decoder(load_lazily(path)[0]).hidden_size
    weight_1D, bias, first = load_head(path / REWARD_HEAD, hidden)
    model = StreamedRewardModel(
        path=path,
        stamps=stamps,
        precision=precision,
        sizes=sizes,
        hidden_bytes=hidden_bytes,
        weight_1D=weight_1D,
        bias=bias,
        tokenizer=input_tokenizer(path, config, date),
        form=TextForm.of(config),
        first=first,
    )
    check_streamed(model.opened, precision)
    return model
