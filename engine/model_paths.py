"""Where a model lies: a folder, or a name on the hub.  Loads no torch."""

from pathlib import Path

from tercet.engine.files import LOCK, checkpoints, placed


def find_model(path: str | Path) -> str:
    """A folder with a model in it, or a hub id.

    Raises:
        FileNotFoundError: neither; names the newest checkpoint where `path` is its run's folder, or
            those of its runs, and a run that has none yet.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if not folder.is_dir() and isinstance(path, str) and _may_be_hub_id(path):
        return path
    near = (checkpoints(folder) or checkpoints(folder.parent))[:1]
    if not near and folder.is_dir():  # a folder of runs: the newest of each
        near = [path for run in sorted(folder.iterdir()) for path in checkpoints(run)[:1]]
    run = next((place for place in (folder, folder.parent) if (place / LOCK).is_file()), None)
    if run is not None and not near:
        raise FileNotFoundError(
            f"find_model: path must be a folder with a model, got {folder}, and the run in {run} "
            "has no checkpoint yet; wait for its first one (train.save_steps), or resume it"
        )
    meant = " or ".join(map(str, near))
    what = "no config.json in" if folder.is_dir() else "no folder"
    raise FileNotFoundError(
        f"find_model: path must be a folder with a model or a hub id, got {what} "
        + (f"{folder}; did you mean {meant}?" if meant else f"{placed(folder)}; check the path")
    )


def _may_be_hub_id(name: str) -> bool:
    """Whether to look for a name on the hub: not if it begins with a folder that is here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    if name.startswith((".", "~")) or Path(name).exists():
        return False
    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    return cached or "/" not in name or not Path(name).parent.is_dir()
