"""A source run by transformers itself, in a process of its own.

Stands alone: it is started by its path, imports neither MLX nor this package, and runs no code of
the source. It reads a request (JSON) from standard input and writes to standard output, for each
row of the request, a line with the shape of an array and the array in fp32:

- `policy`: logits of the answer's tokens [T, V];
- `classifier`: the score that the class of the source gives [1];
- `backbone`: the hidden state of the last token after the final norm [D].
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO


def main() -> None:
    """Load the source, answer the request."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the arrays
    request = json.load(sys.stdin)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = load(request).eval()
    if request["dtype"] == "stored":
        compute_in_fp32(model)
    run = {"policy": policy, "classifier": classifier, "backbone": backbone}[request["kind"]]
    with torch.no_grad():
        for prompt, answer in request["rows"]:
            send(answers, run(model, torch.tensor([prompt + answer]), len(prompt)))


def load(request: dict[str, Any]) -> Any:
    """The source in the class that its configuration names, or transformers' own for its kind."""
    import torch
    import transformers

    auto = {
        "policy": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForSequenceClassification,
        "backbone": transformers.AutoModel,
    }[request["kind"]]
    config = transformers.AutoConfig.from_pretrained(request["model"], trust_remote_code=False)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if request["kind"] == "policy" and hasattr(named, "from_pretrained"):
        auto = named
    if request["kind"] == "classifier":
        config.num_labels = 1
        if request["adapter"]:  # its trainer took the padding token from the tokenizer
            config.pad_token_id = request["padding"]
    model, about = auto.from_pretrained(
        request["model"],
        config=config,
        dtype=torch.float32 if request["dtype"] == "float32" else "auto",
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    head_of_adapter = "score." if request["adapter"] else "\0"
    missing = sorted(n for n in about["missing_keys"] if not n.startswith(head_of_adapter))
    if missing:
        raise ValueError(f"transformers finds no tensor {missing[0]!r}")
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    return model


def compute_in_fp32(model: Any) -> None:
    """Let each module compute in fp32 while its weights stay as they are stored."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            module.register_forward_pre_hook(widen(own))
            module.register_forward_hook(narrow(own, [p.data for p in own]))


def widen(parameters: list[Any]) -> Callable[..., None]:
    """A hook that puts fp32 copies in the place of the weights."""

    def hook(*_: Any) -> None:
        for parameter in parameters:
            parameter.data = parameter.data.float()

    return hook


def narrow(parameters: list[Any], stored: list[Any]) -> Callable[..., None]:
    """A hook that puts the weights back."""

    def hook(*_: Any) -> None:
        for parameter, value in zip(parameters, stored, strict=True):
            parameter.data = value

    return hook


def policy(model: Any, ids: Any, prompt: int) -> Any:
    """Logits that predict the answer's tokens [T, V]."""
    return model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]


def classifier(model: Any, ids: Any, prompt: int) -> Any:
    """The score [1]."""
    return model(input_ids=ids, use_cache=False).logits[0]


def backbone(model: Any, ids: Any, prompt: int) -> Any:
    """Hidden state of the last token [D]."""
    return model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def send(answers: BinaryIO, value: Any) -> None:
    """One array: its shape, its values."""
    answers.write(json.dumps(list(value.shape)).encode() + b"\n")
    answers.write(value.float().contiguous().numpy().tobytes())
    answers.flush()


if __name__ == "__main__":
    main()
