"""Groups of answers that need no model."""

from typing import Any

from mlx_grpo.core.types import Completion, Group, Prompt


def group(*texts: str, **fields: Any) -> Group:
    messages = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "say tea"})
    prompt = Prompt("p1", messages, (1, 2), fields=fields)
    answers = [Completion(tuple(t.encode()), t, "stop", (0.0,) * len(t)) for t in texts]
    return Group(prompt, tuple(answers))
