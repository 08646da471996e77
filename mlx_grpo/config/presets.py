"""Settings that ship with the package as TOML files, to be read and copied: `--config NAME`."""

from pathlib import Path

from mlx_grpo.core.errors import InputError

PRESETS = Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    """What --config takes beside files."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def config_file(given: Path) -> Path:
    """The file that --config means: one of that path, or else a preset of that name.

    Raises:
        InputError: neither is there.
    """
    if given.exists():
        return given
    if given.name == str(given) and given.name in preset_names():
        return PRESETS / f"{given.name}.toml"
    raise InputError(
        f"{given}: no such file, and no preset; these are: {', '.join(preset_names())}"
    )
