"""Embed, blocks and head of any mlx-lm decoder as separate steps, without code per model family.

MLX is lazy: buffers are allocated when a graph is scheduled, so only an evaluation between steps
bounds memory. For that a model must be taken apart. The way in: call the model once with its blocks
replaced by recorders, which shows the input of the first block and the arguments of each; to get
out, re-enter the model's own final norm and head (soft-caps and scalings included) through a
stand-in for the last block that returns given hidden states.

A block is given its cache and whatever else the model gives it: masks, scales, inputs per layer.
What it returns beside hidden states for later blocks, and a cache that later blocks read (the keys
and values that Gemma 3n and 4 share), travels with the hidden states from block to block, so that
gradients flow through it too. `models/check.py` compares the result with the model itself.

Blocks compute in the dtype of their weights; the states behind the last one are fp32, and so are
the norm and the logits that follow from them. In 16 bits a logit around 20 is rounded to steps of
0.125 or 0.016, which is another distribution. Rollouts do the same (`fp32_after_blocks`).

A prompt is run once, and what it leaves serves all its completions (`models/prompt_caches.py`);
gradients flow back through it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_grpo.backend.kernels import whole_tiles
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.block_calls import BlockCall, Embedded, States, travelling
from mlx_grpo.models.families import gated_delta
from mlx_grpo.models.final_norm import FinalNorm, final_norm
from mlx_grpo.models.mlp_chunks import mlp_in_chunks
from mlx_grpo.models.prompt_caches import (
    completion_cache,
    contents,
    filled,
    holds_state,
    prompt_cache,
)
from mlx_grpo.models.stand_ins import (
    Injector,
    Probe,
    Recorder,
    forms_of,
    places_of,
    quoted,
    refusal,
    replaced,
)


@dataclass(frozen=True)
class Sizes:
    """How much of a stage is worked on at a time; the planner chooses what fits into memory."""

    rows: int = 0
    """Completions per pass; 0 means all of similar length."""
    mlp_tokens: int = 0
    """Tokens per pass through an MLP; 0 means all of a pass."""
    head_bytes: int = 32 << 20
    """Of the fp32 logits of one chunk of the head. A handful of arrays of this size live at
    once."""
    kept_blocks: int = 0
    """Last blocks whose arrays an update keeps, so that they do not run twice."""
    texts: int = 0
    """Texts of different prompts per pass; 0 means any number."""
    text_tokens: int = 0
    """Tokens of such a pass; 0 means any number."""


WHOLE = Sizes()
PREFILL_TOKENS = 512
"""Of a prompt at a time, where its keys and values are computed for a rollout."""


def chunk_tokens(vocabulary: int, chunk_bytes: int) -> int:
    """Tokens per chunk of the head whose fp32 logits take at most `chunk_bytes`."""
    return max(1, whole_tiles(chunk_bytes // (4 * vocabulary)))


class Decoder:
    """A decoder taken apart.

    Args:
        model: an mlx-lm model, with or without LoRA layers.
        sizes: how much to work on at a time.

    Raises:
        InputError: this model cannot be taken apart; says why.
    """

    def __init__(self, model: nn.Module, sizes: Sizes = WHOLE):
        self.model = model
        self.sizes = sizes
        self.blocks: list[nn.Module] = list(model.layers)
        self._places = places_of(model)
        self.block_names = list(self._places.names)
        try:
            self._look_inside()
        except InputError as e:
            raise refusal(model, str(e)) from None
        except Exception as e:  # whatever a model's own code raises
            raise refusal(model, f"it cannot be taken apart ({quoted(e)})") from e

    def _look_inside(self) -> None:
        """Run the model once without computing anything: shapes are known all the same."""
        self._kinds = make_prompt_cache(self.model)
        probes = [Probe(block) for block in self.blocks]
        with replaced(self._places, probes):
            self.vocabulary: int = self.model(mx.zeros((1, 2), mx.int32)).shape[-1]
        for probe in probes:
            if len(probe.given) != 1:
                raise InputError(f"it calls a block {len(probe.given)} times instead of once")
        self._forms = forms_of(probes)
        caches = [prompt_cache(kind) for kind in self._kinds]
        h, calls = self._record(mx.zeros((1, 1), mx.int32), caches)
        self.hidden_size: int = h.shape[-1]
        self.dtype = h.dtype
        self._travelling = travelling(calls)
        self._streams = h.ndim > 3
        self.final_norm: FinalNorm | None = final_norm(self.model, self._places, self._recorders())

    def embed(self, prompt_1S: mx.array, rows_KT: mx.array) -> Embedded:
        """Embed a prompt, int [1, S], and its completions, int [K, T], padded on the right."""
        lengths, rows = (prompt_1S.shape[1], rows_KT.shape[1]), rows_KT.shape[0]
        if lengths[1] == 1 and any(isinstance(kind, ArraysCache) for kind in self._kinds):
            rows_KT = mx.pad(rows_KT, [(0, 0), (0, 1)])  # Metal's step of a state has no gradient
        firsts = [prompt_cache(kind) for kind in self._kinds]
        h_prompt, prompt_calls = self._record(prompt_1S, firsts)
        seconds = [  # no block has run: what is in one is left by the embedding
            completion_cache(kind, lengths[0], rows, first if holds_state(first) else None)
            for kind, first in zip(self._kinds, firsts, strict=True)
        ]
        h_rows, row_calls = self._record(rows_KT, seconds)
        return Embedded(h_prompt, h_rows, lengths, prompt_calls, row_calls, self._travelling)

    def run_block(self, e: Embedded, i: int, *states: mx.array) -> States:
        """Block `i` over the prompt, [1, S, D], then over the completions behind it, [K, T, D]; its
        MLP in chunks."""
        with mlp_in_chunks(self.blocks[i], self.sizes.mlp_tokens):
            return self.call_block(e, i, *states)

    @gated_delta.in_pieces()
    def call_block(self, e: Embedded, i: int, *states: mx.array) -> States:
        """As `run_block`, its MLP all at once, to be differentiated."""
        h_prompt, h_rows, *arrays = states
        values = e.unpack(i, arrays)
        number = e.prompt_calls[i].number
        shared = values.get(("cache", -1 if number is None else number, 0))
        first = second = None
        if number is not None:
            first = prompt_cache(self._kinds[number])
            first = filled(first, shared[0]) if shared else first
        of_prompt = e.prompt_calls[i].run(
            self.blocks[i], h_prompt, first, {kept: pair[0] for kept, pair in values.items()}
        )
        if number is not None:
            length, rows = h_prompt.shape[-2], h_rows.shape[-3]
            second = completion_cache(self._kinds[number], length, rows, first)
            second = filled(second, shared[1]) if shared else second
        of_rows = e.row_calls[i].run(
            self.blocks[i], h_rows, second, {kept: pair[1] for kept, pair in values.items()}
        )
        if i + 1 == len(self.blocks):
            h_rows = of_rows[0]
            if h_rows.shape[-2] > e.lengths[1]:
                h_rows = h_rows[..., : e.lengths[1], :]
            return self._leave(of_prompt[0]), self._leave(h_rows)
        for kept in set(e.travelling[i + 1]) - set(values):
            if kept[0] == "cache":
                values[kept] = contents(first), contents(second)
            else:
                values[kept] = of_prompt[1 + kept[2]], of_rows[1 + kept[2]]
        return of_prompt[0], of_rows[0], *e.pack(i + 1, values)

    def forward(self, prompt_1S: mx.array, rows_KT: mx.array) -> tuple[mx.array, mx.array]:
        """Hidden states after the last block, [1, S, D] and [K, T, D]; one block at a time."""
        e = self.embed(prompt_1S, rows_KT)
        states: States = (e.h_prompt, e.h_rows)
        for i in range(len(self.blocks)):
            states = self.run_block(e, i, *states)
            mx.eval(states)
        h_prompt, h_rows = states
        return h_prompt, h_rows

    @contextmanager
    def without_blocks(self) -> Iterator[None]:
        """Within it the model's parameters are those of embedding, final norm and head alone."""
        with replaced(self._places, []):
            yield

    def norm(self, h_BTD: mx.array) -> mx.array:
        """The model's final norm.

        Raises:
            InputError: it has none.
        """
        if self.final_norm is not None:
            return self.final_norm.module(h_BTD)
        owner = self._places.lists[0][0]
        if owner is self.model:
            raise refusal(self.model, "it has no final norm for a reward head to read")
        with replaced(self._places, self._recorders(h_BTD)):  # a function is no module to find
            return owner(mx.zeros(h_BTD.shape[:2], mx.int32))

    def head(self, h_BTD: mx.array) -> mx.array:
        """The model's final norm and head: logits [B, T, V]."""
        tokens = mx.zeros(h_BTD.shape[:2], mx.int32)
        if self._streams and self.final_norm:
            with replaced(self._places, self._recorders()), self.final_norm.reading(h_BTD):
                return self.model(tokens)
        with replaced(self._places, self._recorders(h_BTD)):
            return self.model(tokens)

    def _leave(self, h: mx.array) -> mx.array:
        """What leaves the blocks, in fp32; several streams become the one that the norm reads."""
        h = h.astype(mx.float32)
        if not (self._streams and self.final_norm):
            return h
        # a copy: a model may write into its streams
        with replaced(self._places, self._recorders(mx.array(h))), self.final_norm.noted() as read:
            self.model(mx.zeros(h.shape[-3:-1], mx.int32))
        return read[0]

    def _recorders(self, leaving: mx.array | None = None) -> list[Recorder]:
        """Stand-ins that pass everything through; the last lets the given states leave instead."""
        recorders = [Recorder(b, i, self._forms[i]) for i, b in enumerate(self.blocks)]
        if leaving is not None:
            last = len(self.blocks) - 1
            recorders[last] = Injector(self.blocks[last], last, self._forms[last], leaving)
        return recorders

    def _record(self, tokens: mx.array, caches: list[Any]) -> tuple[mx.array, list[BlockCall]]:
        recorders = self._recorders()
        with replaced(self._places, recorders):
            self.model(tokens, cache=caches)
        return recorders[0].h, [BlockCall.of(r, caches) for r in recorders]


def shift_right(h_prompt: mx.array, h_rows: mx.array) -> mx.array:
    """Hidden states [K, T, D] whose position t predicts completion token t."""
    last = mx.broadcast_to(h_prompt[:, -1:], (h_rows.shape[0], 1, h_rows.shape[2]))
    return mx.concatenate([last, h_rows[:, :-1]], axis=1)


def unshift(grad_KTD: mx.array, prompt_length: int) -> tuple[mx.array, mx.array]:
    """Transpose of `shift_right`: from the gradient of predicting states, [K, T, D], to those of
    the prompt, [1, S, D], and of the rows, [K, T, D]."""
    first_11D = grad_KTD[:, :1].sum(axis=0, keepdims=True)
    g_prompt = mx.pad(first_11D, [(0, 0), (prompt_length - 1, 0), (0, 0)])
    g_rows = mx.pad(grad_KTD[:, 1:], [(0, 0), (0, 1), (0, 0)])
    return g_prompt, g_rows
