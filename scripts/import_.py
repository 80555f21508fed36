"""ofa-import: a published supernet checkpoint instead of training one."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from ofa.errors import UserError
from ofa.space import Space, load_space
from scripts.cli import stage_command
from scripts.parts import TRAIN, load_data
from scripts.stage import open_stage, plain

ORIGIN = "import.json"
IMAGENET = 1000  # classes
DEFAULT = "ofa.data.digits"  # what is taken for the data where none are given


@stage_command("space")
def main(cfg: DictConfig) -> list[str]:
    """Read once-for-all's checkpoint of a whole supernet in place of training.  Writes <run>/train.

    Give the data that the checkpoint was trained for too (data=folder data.path=imagenet), and to every stage after.
    """
    if cfg.checkpoint is None:
        raise UserError("ofa-import needs a file or URL; give checkpoint=<file or URL>")
    space = load_space(plain(cfg.space))
    more = _missing(cfg, space)
    with open_stage(cfg, "train", TRAIN) as stage:
        if stage.done:
            _check_origin(stage.folder, cfg)
            return more
        from ofa.checkpoint import import_supernet
        from ofa.files import write_json
        from ofa.weights import save_tensors

        supernet, digest = import_supernet(space, cfg.checkpoint, sha256=cfg.sha256)
        origin = {"checkpoint": str(cfg.checkpoint), "sha256": digest}
        write_json(stage.folder / ORIGIN, origin)
        metadata = {"space": space.to_dict(), **origin}
        save_tensors(stage.folder / "supernet.safetensors", supernet.state_dict(), metadata)
        count = sum(parameter.numel() for parameter in supernet.parameters())
        print(f"{space.name}: {count / 1e6:.2f} M parameters from {cfg.checkpoint}, SHA-256 {digest}")
    return more


def _missing(cfg: DictConfig, space: Space) -> list[str]:
    """Options that the stages after need, where the default data are not those of the checkpoint's space.

    Raises UserError where data were given and are not.
    """
    data = load_data(cfg)
    if (data.channels, len(data.classes)) == (space.in_channels, space.classes):
        return []
    images = f"{space.name} is for images of {space.in_channels} channels in {space.classes} classes"
    has = f"{data.name} has {data.channels} in {len(data.classes)}"
    if cfg.data._target_ != DEFAULT:
        raise UserError(f"{images}, {has}; import without data, and then train with train.initial=<the imported file>")
    print(f"{images}: give their data to every stage after")
    return ["data=imagenet" if space.classes == IMAGENET else "data=folder", "data.path=<folder>"]


def _check_origin(folder: Path, cfg: DictConfig) -> None:
    """Raise UserError where a finished stage holds other weights than this command's checkpoint."""
    from ofa.checkpoint import read_checkpoint
    from ofa.files import read_json

    origin = read_json(folder / ORIGIN) if (folder / ORIGIN).exists() else {"checkpoint": "training", "sha256": None}
    named = origin["checkpoint"] == str(cfg.checkpoint) and not Path(cfg.checkpoint).is_file()  # gone since, or a URL
    same = named or origin["sha256"] == read_checkpoint(cfg.checkpoint)[1]
    if not same or str(cfg.sha256 or origin["sha256"]).lower() != origin["sha256"]:
        raise UserError(
            f"{folder} holds weights of {origin['checkpoint']}, SHA-256 {origin['sha256']}, not of this checkpoint; "
            "give another run=<folder>, or restart=true to discard what is there"
        )


if __name__ == "__main__":
    main()
