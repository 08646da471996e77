"""Files from elsewhere are data: nothing in them runs, and no name in them leads out."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data.chat import load_chat_tokenizer
from mlx_grpo.data.prompts import load_prompts
from mlx_grpo.files.atomic import write_json
from mlx_grpo.files.manifest import MANIFEST, sha256, verify_manifest, write_manifest
from mlx_grpo.models.backbone import load_backbone
from mlx_grpo.models.lora import load_adapter
from tests.helpers.tiny import write_model, write_tokenizer

PACKAGE = Path(__file__).parents[2] / "mlx_grpo"
ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0]['content']) }}",
    "{{ lipsum.__globals__['os'].popen('touch ' ~ messages[0]['content']).read() }}",
    "{{ self.__init__.__globals__.__builtins__.open(messages[0]['content'], 'w') }}",
    "{{ messages.append(messages[0]) }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_a_chat_template_reaches_nothing_outside_of_its_sandbox(
    template: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    write_tokenizer(model, chat_template=template)
    owned = tmp_path / "owned"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": str(owned)}) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl:1: the chat template refuses"):
        load_prompts(prompts, load_chat_tokenizer(model), 10_000)
    with pytest.raises(InputError, match=rf"{model}: the chat template refuses"):
        load_backbone(model)
    assert not owned.exists()


def test_code_in_a_model_directory_is_refused_not_run(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    owned = tmp_path / "owned"
    (model / "evil.py").write_text(f"open({str(owned)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    for field in ({"model_file": "evil.py"}, {"auto_map": {"AutoConfig": "evil.Evil"}}):
        (model / "config.json").write_text(json.dumps({**config, **field}))
        tokenizer = json.loads((model / "tokenizer_config.json").read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        try:
            load_backbone(model)
        except InputError as e:
            assert str(model) in str(e)
        assert not owned.exists()


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    import pickle

    class Owned:
        def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
            raise AssertionError("only made, never read")

    model = write_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(InputError, match=r"model"):
        load_backbone(model)


def test_the_package_neither_unpickles_nor_trusts_remote_code() -> None:
    banned = {"pickle", "shelve", "marshal", "dill", "joblib"}
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not banned & {a.name.split(".")[0] for a in node.names}, file
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, file
            if isinstance(node, ast.Call):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("trust_remote_code", "False") == "False", file
                assert keywords.get("allow_pickle", "False") == "False", file
                assert ast.unparse(node.func) not in ("eval", "exec"), file
                if ast.unparse(node.func) == "torch.load":
                    assert keywords.get("weights_only") == "True", file


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/../../secret.txt"])
def test_a_manifest_does_not_lead_out_of_its_directory(name: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    write_json(place / MANIFEST, {"files": {name: sha256(tmp_path / "secret.txt")}})
    with pytest.raises(InputError, match=r"manifest\.json: lists '.*', which is outside"):
        verify_manifest(place)


@pytest.mark.parametrize("kind", ["sft", "adapter"])
def test_damage_is_named_before_anything_is_loaded(
    kind: str, sft: Path, reward_model: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(sft if kind == "sft" else reward_model, tmp_path / "copy"))
    write_manifest(place)
    backbone = load_backbone(sft)
    loads: dict[str, Callable[[], object]] = {
        "sft": lambda: load_backbone(place),
        "adapter": lambda: load_adapter(backbone.model, place),
    }
    loads[kind]()
    weights = max(place.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4  # one bit of one number: MLX would load it without a word
    weights.write_bytes(content)
    mx.eval(mx.load(str(weights)))
    with pytest.raises(InputError, match=rf"{weights.name}: does not match manifest\.json"):
        loads[kind]()
