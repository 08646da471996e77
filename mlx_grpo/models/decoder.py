"""Embed, blocks and head of any mlx-lm decoder as separate steps, without code per model family.

MLX is lazy: buffers are allocated when a graph is scheduled, so only an evaluation between steps
bounds memory. For that a model must be taken apart. The way in: call the model once with its blocks
replaced by recorders, which shows the input of the first block and the arguments (mask, cache) of
each; to get out, re-enter the model's own final norm and head (soft-caps and scalings included)
through a stand-in block that returns given hidden states.

Blocks compute in the dtype of their weights; the states behind the last one are fp32, and so are
the norm and the logits that follow from them. In 16 bits a logit around 20 is rounded to steps of
0.125 or 0.016, which is another distribution. Rollouts do the same (`fp32_after_blocks`).

A prompt is run once and its keys and values serve all its completions; gradients flow back through
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import create_attention_mask

from mlx_grpo.backend.kernels import whole_tiles
from mlx_grpo.core.errors import InputError
from mlx_grpo.models.mlp_chunks import mlp_in_chunks


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


WHOLE = Sizes()
PREFILL_TOKENS = 512
"""Of a prompt at a time, where its keys and values are computed for a rollout."""


def chunk_tokens(vocabulary: int, chunk_bytes: int) -> int:
    """Tokens per chunk of the head whose fp32 logits take at most `chunk_bytes`."""
    return max(1, whole_tiles(chunk_bytes // (4 * vocabulary)))


class _Prefix:
    """Common part of the two caches below: positions and masks as mlx-lm's own caches give them."""

    offset = 0

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return create_attention_mask(n, self.offset, return_array, window_size)


class PromptCache(_Prefix):
    """Remembers the prompt's keys and values, [1, heads, T_prompt, d], and passes them through."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class CompletionCache(_Prefix):
    """Puts the prompt's keys and values, broadcast over rows, before the completions' own."""

    def __init__(self, prompt_length: int, prompt: PromptCache | None = None):
        self.offset, self.prompt = prompt_length, prompt

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.prompt is None:
            raise RuntimeError("a placeholder cache cannot be run")

        def join(prefix: mx.array, own: mx.array) -> mx.array:
            return mx.concatenate(
                [mx.broadcast_to(prefix, (own.shape[0], *prefix.shape[1:])), own], axis=2
            )

        return join(self.prompt.keys, keys), join(self.prompt.values, values)


class _Recorder:
    """Stands in for a block: notes its arguments, passes the hidden states through."""

    def __init__(self, block: nn.Module):
        self.block = block

    def __getattr__(
        self, name: str
    ) -> Any:  # models read attributes such as `use_sliding` off their blocks
        return getattr(self.__dict__["block"], name)

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.h, self.args, self.kwargs = h, args, kwargs
        return h


class _Injector(_Recorder):
    """Stands in for a block: returns given hidden states instead of its input."""

    def __init__(self, block: nn.Module, h: mx.array):
        super().__init__(block)
        self.given = h

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self.given


class _Fp32Exit(_Recorder):
    """Stands in for the last block: what leaves it is fp32."""

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self.block(h, *args, **kwargs).astype(mx.float32)


class _Evaluated(_Recorder):
    """Stands in for a block whose arrays are to be gone before the next one runs."""

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        h = self.block(h, *args, **kwargs)
        mx.eval(h)
        return h


@dataclass(frozen=True)
class BlockCall:
    """The arguments one block receives; `slot` is the cache object to be replaced by a real one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: Any

    def is_mask_and_cache(self) -> bool:
        """Whether the block took one mask and one cache, and nothing else."""
        rest = [a for a in (*self.args, *self.kwargs.values()) if a is not self.slot]
        given = len(self.args) + len(self.kwargs)
        return given == 2 and len(rest) == 1 and isinstance(rest[0], mx.array | str | None)

    def run(self, block: nn.Module, h: mx.array, cache: Any) -> mx.array:
        """Call `block` on `h` with `cache` in place of the recorded one."""
        args = [cache if a is self.slot else a for a in self.args]
        kwargs = {n: cache if a is self.slot else a for n, a in self.kwargs.items()}
        return block(h, *args, **kwargs)


@dataclass(frozen=True)
class Embedded:
    """Hidden states entering the first block, and the arguments of every block."""

    h_prompt: mx.array
    h_rows: mx.array
    prompt_calls: list[BlockCall]
    row_calls: list[BlockCall]


class Decoder:
    """A decoder taken apart.

    Args:
        model: an mlx-lm model, with or without LoRA layers.
        sizes: how much to work on at a time.

    Raises:
        InputError: the blocks of this model do not take (h, mask, cache).
    """

    def __init__(self, model: nn.Module, sizes: Sizes = WHOLE):
        self.model = model
        self.sizes = sizes
        self.blocks: list[nn.Module] = list(model.layers)
        owner_name, self._owner = _owner_of_blocks(model)
        self.block_names = [f"{owner_name}.layers.{i}" for i in range(len(self.blocks))]
        token = mx.zeros((1, 1), mx.int32)
        self.hidden_size: int = self.embed(token, token).h_rows.shape[-1]
        self.vocabulary: int = model(token).shape[-1]  # lazy: a shape costs no arithmetic

    def embed(self, prompt_1S: mx.array, rows_KT: mx.array) -> Embedded:
        """Embed a prompt, int [1, S], and its completions, int [K, T], padded on the right."""
        h_prompt, prompt_calls = self._record(prompt_1S, [PromptCache() for _ in self.blocks])
        h_rows, row_calls = self._record(rows_KT, self._placeholders(prompt_1S.shape[1]))
        return Embedded(h_prompt, h_rows, prompt_calls, row_calls)

    def run_block(
        self, e: Embedded, i: int, h_prompt: mx.array, h_rows: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Block `i` over the prompt, [1, S, D], then over the completions behind it, [K, T, D]; its
        MLP in chunks."""
        with mlp_in_chunks(self.blocks[i], self.sizes.mlp_tokens):
            return self.call_block(e, i, h_prompt, h_rows)

    def call_block(
        self, e: Embedded, i: int, h_prompt: mx.array, h_rows: mx.array
    ) -> tuple[mx.array, mx.array]:
        """As `run_block`, all at once, to be differentiated."""
        block, prompt = self.blocks[i], PromptCache()
        h_prompt = e.prompt_calls[i].run(block, h_prompt, prompt)
        cache = CompletionCache(h_prompt.shape[1], prompt)
        h_rows = e.row_calls[i].run(block, h_rows, cache)
        if i + 1 < len(self.blocks):
            return h_prompt, h_rows
        return h_prompt.astype(mx.float32), h_rows.astype(mx.float32)

    def forward(self, prompt_1S: mx.array, rows_KT: mx.array) -> tuple[mx.array, mx.array]:
        """Hidden states after the last block, [1, S, D] and [K, T, D]; one block at a time."""
        e = self.embed(prompt_1S, rows_KT)
        h_prompt, h_rows = e.h_prompt, e.h_rows
        for i in range(len(self.blocks)):
            h_prompt, h_rows = self.run_block(e, i, h_prompt, h_rows)
            mx.eval(h_prompt, h_rows)
        return h_prompt, h_rows

    @contextmanager
    def without_blocks(self) -> Iterator[None]:
        """Within it the model's parameters are those of embedding, final norm and head alone."""
        with _replaced(self._owner, []):
            yield

    def norm(self, h_BTD: mx.array) -> mx.array:
        """The model's final norm."""
        return self._inject(self._owner, h_BTD)

    def head(self, h_BTD: mx.array) -> mx.array:
        """The model's final norm and head: logits [B, T, V]."""
        return self._inject(self.model, h_BTD)

    def _placeholders(self, prompt_length: int) -> list[CompletionCache]:
        return [CompletionCache(prompt_length) for _ in self.blocks]

    def _record(self, tokens: mx.array, caches: list[Any]) -> tuple[mx.array, list[BlockCall]]:
        recorders = [_Recorder(block) for block in self.blocks]
        with _replaced(self._owner, recorders):
            self.model(tokens, cache=caches)
        calls = [BlockCall(r.args, r.kwargs, c) for r, c in zip(recorders, caches, strict=True)]
        if not all(call.is_mask_and_cache() for call in calls):
            kind = type(self.model).__module__.rsplit(".", 1)[-1]
            raise InputError(
                f"model type '{kind}' is not supported: its blocks do not take (h, mask, cache)"
            )
        return recorders[0].h, calls

    def _inject(self, module: nn.Module, h: mx.array) -> mx.array:
        first, *rest = self.blocks
        with _replaced(self._owner, [_Injector(first, h), *map(_Recorder, rest)]):
            return module(mx.zeros(h.shape[:2], mx.int32))


def _owner_of_blocks(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and inner module whose attribute `layers` is the list of blocks."""
    for name, module in model.named_modules():
        if module is not model and isinstance(module.get("layers"), list):
            return name, module
    raise InputError(
        f"model type '{type(model).__module__}' is not supported: no list of blocks found"
    )


@contextmanager
def _replaced(owner: nn.Module, blocks: list[Any]) -> Iterator[None]:
    original = owner.layers
    owner.layers = blocks
    try:
        yield
    finally:
        owner.layers = original


@contextmanager
def fp32_after_blocks(model: nn.Module) -> Iterator[None]:
    """Within it the final norm and the head of an mlx-lm model see fp32 states."""
    _, owner = _owner_of_blocks(model)
    *others, last = owner.layers
    with _replaced(owner, [*others, _Fp32Exit(last)]):
        yield


@contextmanager
def one_block_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within it each block of an mlx-lm model is evaluated before the next: a GPU would have the
    arrays of many alive."""
    _, owner = _owner_of_blocks(model)
    with _replaced(owner, list(map(_Evaluated, owner.layers))):
        yield


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
