"""ofa-import: a published supernet checkpoint instead of training one."""

from __future__ import annotations

from omegaconf import DictConfig

from ofa.errors import UserError
from scripts.cli import stage_command
from scripts.parts import TRAIN
from scripts.stage import open_stage, plain


@stage_command("space")
def main(cfg: DictConfig) -> None:
    """Read once-for-all's checkpoint of a whole supernet in place of training.  Writes <run>/train.

    Give the data that the checkpoint was trained for too (data=folder data.path=imagenet), and to every stage after.
    """
    if cfg.checkpoint is None:
        raise UserError("ofa-import needs a file or URL; give checkpoint=<file or URL>")
    with open_stage(cfg, "train", TRAIN) as stage:
        if stage.done:
            return
        from ofa.checkpoint import import_supernet
        from ofa.files import write_json
        from ofa.space import load_space
        from ofa.weights import save_tensors

        space = load_space(plain(cfg.space))
        supernet, digest = import_supernet(space, cfg.checkpoint, sha256=cfg.sha256)
        origin = {"checkpoint": str(cfg.checkpoint), "sha256": digest}
        write_json(stage.folder / "import.json", origin)
        metadata = {"space": space.to_dict(), **origin}
        save_tensors(stage.folder / "supernet.safetensors", supernet.state_dict(), metadata)
        count = sum(parameter.numel() for parameter in supernet.parameters())
        print(f"{space.name}: {count / 1e6:.2f} M parameters from {cfg.checkpoint}, SHA-256 {digest}")


if __name__ == "__main__":
    main()
