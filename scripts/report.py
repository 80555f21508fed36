"""ofa-report: one HTML page and a table in the terminal."""

from __future__ import annotations

from omegaconf import DictConfig

from scripts.cli import stage_command


@stage_command()
def main(cfg: DictConfig) -> None:
    """Write report.html, one self-contained page, and print the summary.  Writes <run>/report.html."""
    from rich.console import Console

    from ofa.report import print_summary, write_report

    page = write_report(cfg.run)
    print_summary(Console(), cfg.run)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
