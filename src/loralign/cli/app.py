"""The command line: one function per command, which parses, calls the library and says what came out.

Exit codes: 0 ok · 1 the work failed · 2 bad input · 3 verification failed · 129, 130, 143 stopped. An error is one
sentence on stderr; `--debug` adds the traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from loralign.cli.expand import expand
from loralign.cli.finished import evaluate, export, generate, verify
from loralign.cli.guard import guarded
from loralign.cli.parameters import AsJson, Device, Overrides, Recipe
from loralign.cli.rows import rows
from loralign.cli.run import file_of, job_of, progress, say
from loralign.cli.schema import schema
from loralign.cli.subspace import app as subspace
from loralign.cli.suggest import suggest
from loralign.cli.tasks import tasks

app = typer.Typer(
    name="loralign",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LoRA that keeps up with full fine-tuning; leaves a plain PEFT adapter behind.",
    epilog="To begin: `loralign suggest MODEL --rows FILE --out mine.yaml`, or copy one of examples/. Any command "
    "takes --debug for the traceback of an error.",
)

FIRST = "Before a run"
RUN = "A run"
DONE = "A finished adapter"
MORE = "More"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return guarded(app, list(sys.argv[1:] if argv is None else argv))


def _version(wanted: bool) -> None:
    if wanted:
        say(version("loralign"))
        raise typer.Exit


@app.callback(no_args_is_help=False)
def root(
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    pass


app.command(rich_help_panel=FIRST, epilog="Example: loralign suggest Qwen/Qwen3-0.6B --rows rows.jsonl --out sft.yaml")(
    suggest
)
app.command(rich_help_panel=FIRST, epilog="Example: loralign rows examples/sft-lora-ga.yaml --count 5")(rows)


@app.command(rich_help_panel=FIRST, epilog="Example: loralign plan examples/sft-lora-ga.yaml --device cuda")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    device: Annotated[Device, typer.Option(help="Where it will run; auto: a GPU if there is one.")] = Device.auto,
    gpus: Annotated[int, typer.Option(min=1, max=4096, help="Over so many GPUs; the memory is one's.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Split by FSDP2 through accelerate; else each holds all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a recipe costs before anything is spent: memory, time of the start, learning rate, exported rank."""
    file, chosen = file_of(recipe, overrides, device=device.value, spread=(gpus, fsdp))
    from loralign.cli.plan import Layout, as_data, planned, sentences

    found = planned(file, device.value, Layout(gpus, fsdp))
    if as_json:
        say(json.dumps({**as_data(found), **({"chosen_by": chosen} if chosen else {})}))
        return
    if chosen:
        say(chosen)
    for line in sentences(found):
        say(line)


@app.command(rich_help_panel=RUN, epilog="Example: loralign train examples/sft-lora-ga.yaml --set train.epochs=0.1")
def train(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Parse, check and plan; train nothing.")] = False,
) -> None:
    """Train a recipe, export a plain PEFT adapter and verify it in a clean process."""
    if dry_run:
        plan(recipe, overrides)
        return
    job = job_of(recipe, overrides, resume=resume)
    context.obj.output = job.output
    from loralign.evidence.ranks import leave
    from loralign.train.sft import run

    with progress() as report:
        result = run(job, resume=resume, progress=report)
    leave()
    for name, value in result.metrics.items():
        say(f"{name}: {value:.6g}")
    for line in result.export.lines() if result.export is not None else ():
        say(line)
    say(f"{'Verified' if result.verified else 'Written'}: {result.output}")


@app.command(rich_help_panel=RUN, epilog="Example: loralign init examples/sft-lora-ga.yaml --set output=start --report")
def init(
    recipe: Recipe,
    overrides: Overrides = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure how much of a held-out gradient the start can follow.")
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help="A start to measure too; default: lora, lora-ga and hrp-sketch."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="An adapter, checkpoint or basis file whose common subspace is measured."),
    ] = None,
) -> None:
    """Only the initialised adapter of a recipe, for other trainers."""
    from loralign.types import LoralignError

    if (beside or source) and not report:
        raise LoralignError("--beside and --source belong to the report: add --report")
    job = job_of(recipe, overrides)
    from loralign.cli.report import measure_of, write_report
    from loralign.io.folder import removed_on_failure
    from loralign.train.sft import initialise

    with progress() as bars:
        measure = measure_of(beside, source or (), cache=job.cache, progress=bars) if report else None
        shares = initialise(job, measure=measure, progress=bars)
    with removed_on_failure(job.output):
        lines = write_report(job.output, shares) if shares else ()
    for line in lines:
        say(line)
    say(f"Written: {job.output}")


@app.command(rich_help_panel=RUN, epilog="Example: loralign compare examples/compare.yaml --workers 2")
def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study file (YAML).")],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine, dealt out over its GPUs.")] = 1,
    worker: Annotated[bool, typer.Option("--worker", help="Only work on the study, print what is done here.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Run nothing, report what is finished.")] = False,
) -> None:
    """Compare methods, each at its own tuned learning rate, beside tuned `lora` and full fine-tuning.

    Interrupted anywhere, the same command goes on where it was.
    Other machines that see the study's folder share the work by `loralign compare STUDY --worker`.
    Arms, seeds and budgets may be added to a study later.
    """
    from loralign.cli.compare import run

    run(study, overrides or (), workers=workers, worker=worker, only_report=only_report)


app.command(rich_help_panel=RUN, epilog="Example: loralign tasks examples/tasks.yaml --set seed=1")(tasks)
app.command(rich_help_panel=DONE, epilog="Example: loralign export runs/lora-ga --profile portable --out served")(
    export
)
app.command(rich_help_panel=DONE, epilog="Example: loralign verify runs/lora-ga --base smollm2-135m")(verify)
app.command("eval", rich_help_panel=DONE, epilog="Example: loralign eval runs/lora-ga --data test.jsonl --limit 200")(
    evaluate
)
app.command(rich_help_panel=DONE, epilog='Example: loralign generate runs/lora-ga --prompt "What is 12 + 30?"')(
    generate
)
app.command(
    rich_help_panel=DONE, epilog="Example: loralign expand runs/prolora/compact/compact.safetensors --out plain"
)(expand)


@app.command(rich_help_panel=MORE, epilog="Example: loralign methods lora-ga")
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="One of them, or a mix: its equation, source and options.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The methods, with their papers, export class and learning-rate prior; or one of them in full."""
    from loralign.cli.show import lines_of, method_data, method_page, method_table

    lines = lines_of(name)
    if as_json:
        say(json.dumps(method_data(lines), ensure_ascii=False))
    else:
        say(method_table() if name is None else "\n\n".join(map(method_page, lines)))


@app.command(rich_help_panel=MORE, epilog="Example: loralign doctor")
def doctor() -> None:
    """Check versions, devices and the adapter machinery (exit 1 if something is wrong)."""
    from loralign.cli.doctor import diagnose

    lines, healthy = diagnose()
    for line in lines:
        say(line)
    raise typer.Exit(0 if healthy else 1)


app.command(rich_help_panel=MORE, epilog="Example: loralign schema --out docs/schema.json")(schema)
app.add_typer(subspace, rich_help_panel=MORE)

if __name__ == "__main__":
    sys.exit(main())
