"""`sivae-dist evaluate RUN`."""

from __future__ import annotations

from pathlib import Path


def evaluate(run: Path, /, images: int = 1024, checkpoint: str = "latest") -> None:
    """Evaluate a run's averaged weights on its held-out split, and draw the grid.

    Args:
        run: run folder, for example runs/quickstart.
        images: held-out images used (all, if there are fewer), and as many samples.
        checkpoint: latest, or the name of one in RUN/checkpoints.
    """
    from sivae_dist.engine.judge import judge  # noqa: PLC0415 (keeps --help quick)

    results, picture = judge(run, images=images, checkpoint_name=checkpoint)
    for name, value in results.items():
        print(f"{name:<24}{value:.4f}")
    print(f"grid (real | reconstruction | sample): {picture}")


COMMANDS = {"evaluate": evaluate}
