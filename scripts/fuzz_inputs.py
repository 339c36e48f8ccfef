"""Inputs that people write: recipes, overrides and words of the command line."""

from __future__ import annotations

import inspect
import random
import string

from fuzz_world import CASE, RECIPE, Input, Kind, write
from loralign.methods.table import METHODS

NOT_FINITE = [".inf", "-.inf", ".nan", "1e999"]
BAD_NUMBERS = [*NOT_FINITE, "-1", "1e308", "many", "[1]", "{a: 1}", "true", "1:30", "1_000", f"{'9' * 5000}", "'3'"]
BAD_COUNTS = [*BAD_NUMBERS, "0", "1.5", f"1{'0' * 40}"]
BAD_TEXTS = ["3", "[a]", "{a: 1}", "true", "null", ".nan", '"a\\0b"', '"\\ud800"']
BAD_PATHS = [*BAD_TEXTS, "''", "' '", "~nobody-of-this-name/x", "x" * 300, "a/" * 2500 + "a"]
BAD_BETAS = ["[2, 3]", "[.nan, 0.9]", "[0.9]", "[0.9, 1]", "x", "[0.9, 0.9, 0.9]", "[-1, 0]"]
KEYS: dict[str, list[str]] = {
    "rank": BAD_COUNTS,
    "alpha": [*BAD_NUMBERS, "0", "1e-320"],
    "dropout": [*BAD_NUMBERS, "1", "1.0"],
    "seed": [*NOT_FINITE, "-1", "1.5", f"1{'0' * 40}", "x", "[1]"],
    "weight_decay": BAD_NUMBERS,
    "max_grad_norm": BAD_NUMBERS,
    "train.learning_rate": [*NOT_FINITE, "-1", "0", "many", "[1]", "1e-320"],
    "train.steps": BAD_COUNTS,
    "train.batch_size": [*BAD_COUNTS, "1000000007"],
    "train.micro_batch_size": [*BAD_COUNTS, "3", "1000000007"],
    "train.warmup": [*BAD_NUMBERS, "1.0", "3"],
    "train.eval_every": BAD_COUNTS,
    "train.save_every": BAD_COUNTS,
    "train.keep": BAD_COUNTS,
    "train.patience": BAD_COUNTS,
    "train.log_every": BAD_COUNTS,
    "train.workers": [*BAD_NUMBERS, "1000000", f"1{'0' * 40}"],
    "train.load_best": ["1", "on", "'true'", "[true]", "true"],
    "train.report_to": ["3", "wandb", "{a: 1}", "[3]", "[[a]]"],
    "train.schedule": ["cosin", "3", "[cosine]", "null", "x" * 5000],
    "train.precision": ["fp16", "32", "null", "x" * 5000],
    "train.extra": ["3", "[a]", "{max_step: 3}", "{hub_token: x}", "{fsdp: full_shard}", "{seed: 3}", "{optim: foo}",
                    "{neftune_noise_alpha: much}", "{label_smoothing_factor: much}", "{dataloader_drop_last: [1]}"],
    "data.max_length": BAD_COUNTS,
    "data.packing": ["1", "yes", "'false'"],
    "data.eval": ["1.5", "0", "-0.5", ".nan", "[a]", "''"],
    "data.train": BAD_PATHS,
    "data.assistant_only": ["1", "yes", "null"],
    "data": ["3", "[a]", "null", "{}", "rows.jsonl"],
    "train": ["3", "[a]", "rows.jsonl", "{step: 3}", "{steps: 3, epochs: 2}"],
    "model": [*BAD_PATHS, "no-such-folder", "./no-such", "rows.jsonl", "case"],
    "output": [*BAD_PATHS, "rows.jsonl", "rows.jsonl/x", "/proc/x", "o" * 250, "base"],
    "cache": [path for path in BAD_PATHS if path != "null"],
    "revision": ["3", "[a]", "x" * 5000],
    "preset": ["paper", "3", "x" * 5000, "[a]"],
    "method": ["lorra", "dora", "3", "[lora]", "null", "lora+", "+", "full + lora", "pissa + lora-ga", "x" * 5000,
    "''"],
    "targets": ["'(['", "3", "{a: 1}", "[3]", "'(([a-z.0-9_]+)+)+X'", "'*'", "'(?P<a'", "'\\\\'"],
    "exclude": ["3", "q_proj", "[3]", "{a: 1}"],
    "ranks": ["3", "[a]", "{q_proj: 0}", "{q_proj: x}", "{q_proj: .inf}", "{q_proj: 1000000000000}"],
    "trust_remote_code": ["1", "yes", "null"],
    "task": ["dpo", "3", "null"],
    "options": ["3", "[a]", "{gama: 3}", "{betas: [2, 3]}", "{eps: -1}"],
}  # fmt: skip


def value(draw: random.Random, number: int) -> Input:
    """A key of a recipe with a value that it must not have; data and extras are read by a run, the rest by a plan."""
    keys = list(KEYS)
    key = keys[number % len(keys)]
    bad = KEYS[key][(number // len(keys)) % len(KEYS[key])]
    late = key in ("train.extra", "data.train", "data.eval", "output", "cache", "train.report_to", "targets")
    words = ["train", "r.yaml"] if late else ["plan", "r.yaml"]
    return Input([*words, *draw.choice(([], ["--set", "train.log_every=1"])), "--set", f"{key}={bad}"])


def option(draw: random.Random, number: int) -> Input:
    """An option of a method that is out of its bounds, of another type or unknown."""
    method = list(METHODS.values())[number % len(METHODS)]
    made = [f for f in (method.init, method.form, method.transform, method.outer, *method.rules) if f]
    known = {n: p.default for f in made for n, p in inspect.signature(f).parameters.items()}
    known |= {} if method.reference else {"betas": (0.9, 0.999)}
    numbers = [name for name, default in known.items() if type(default) in (int, float)]
    choice = draw.randrange(4)
    if choice == 0 or not known:
        name = "".join(draw.choices(string.ascii_lowercase, k=draw.choice([1, 6, 400])))
        given = f"{{{name}_: 1}}"
    elif choice == 1 and "betas" in known and not method.transform:
        given = f"{{betas: {draw.choice(BAD_BETAS)}}}"
    elif numbers:
        given = f"{{{draw.choice(numbers)}: {draw.choice([*NOT_FINITE, '-1', '-1e9', 'x', '[1]', '{a: 1}', 'true'])}}}"
    else:
        given = f"{{{draw.choice(list(known))}: {draw.choice(['{a: [b]}', '[[1]]'])}}}"
    return Input(["plan", "r.yaml", "--set", f"method={method.id}", "--set", f"options={given}"])


def key(draw: random.Random, number: int) -> Input:
    """A key that does not exist: a slip in one that does, or another place."""
    name = draw.choice(list(KEYS))
    at = draw.randrange(len(name))
    other = draw.choice([name[:at] + draw.choice("xyzq") + name[at:], name + ".x", "x." + name, name + "_", "q" * 5000])
    if other.split(".")[0] in ("options", "ranks") or other.startswith("train.extra."):
        other = "x" + other
    return Input(["plan", "r.yaml", "--set", f"{other}=3"])


BROKEN = [
    "", "- a", "3", "null", "a", "\t", "[", "{", "a: b: c", "'", '"', "&a", "*a", "a: *b", "? [a, b]\n: c", "{[a]: 1}",
    "--- a\n--- b", "a: !!python/object:os.system x", "seed: !!bool x", "seed: !!int ''", "seed: !!float ''",
    "seed: !!timestamp x", "seed: !!binary x", "exclude: !!set {x, y}", "exclude: &a [*a]", "1: 2", "null: 3",
    "a: 1\na: 2",
    "model: x\nmodel: y", "a: " + "[" * 3000, "a: " + "{a: " * 3000, "%YAML 9.9\n---\na: b", "a: \0", "a: \ud800",
    "a: !x y",
    "b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40)) + "exclude: *b39",
    "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}], k{i}: 1}}\n" for i in range(1, 40)),
    "x" * 2_000_000, "a: [" + "1," * 30_000 + "1]", "<<: 3", "<<: [3]", "a: " + "9" * 5000, "options: {? {a: 1} : 2}",
]  # fmt: skip


NOISE = [b"", b"\xff", b": ", b"[", b"&", b"*", b"!!", b"'", b"\n", b"\0"]


def broken(draw: random.Random, number: int) -> Input:
    """A file that is no recipe: broken YAML, or a good recipe with bytes cut, changed or put in."""
    if number < len(BROKEN):
        text = BROKEN[number]
        content: str | bytes = text
        bad: bool | None = True
    else:
        whole = bytearray(RECIPE.encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(whole))
            whole[at : at + draw.randint(0, 3)] = draw.choice(
                [b"", b"\xff", b": ", b"[", b"&", b"*", b"!!", b"'", b"\n", b"\0"]
            )
        content, bad = bytes(whole), None
    write(CASE / "r.yaml", content)
    return Input(["plan", str(CASE / "r.yaml")], bad)


def override(draw: random.Random, number: int) -> Input:
    """Words after --set that are no key=value, or whose value is broken YAML."""
    given = draw.choice([
        "", "=", "=3", "train", "train.=3", ".train=3", "train..steps=3", "train.steps.x=3", "method.x=3", "a" * 5000,
        "." * 60 + "=3", "a." * 60 + "a=3", "seed=[", "seed={", "seed='", "seed=!!bool x", "exclude=&a [*a]",
        "seed=\t-",
        "seed=: :", "seed=? [a]", f"seed={'[' * 2000}", "exclude={[a]: 1}", "targets=!!python/name:os.system",
    ])  # fmt: skip
    return Input([draw.choice(["plan", "train", "init"]), "r.yaml", "--set", given])


CALLS = """
trian r.yaml
train
train r.yaml extra
train --resume
plan r.yaml --devise cpu
plan r.yaml --device tpu
plan LONG
plan base
plan no.yaml
plan /dev/null
plan rows.jsonl
plan good/out/adapter_model.safetensors
train r.yaml --set
init r.yaml --beside lora
init r.yaml --report --beside LONG
init r.yaml --report --source LONG
export good/out
export nowhere --out case/e
export good/out --out rows.jsonl
export good/out --out case/e --profile ggml
export good/out --out case/e --profile gguf --power-of-two
export good/out --out case/e --max-rank 0
export good/out --out LONG
export good/out --out case/e --max-rank x
export good/out --out case/e --dtype int8
export LONG --out case/e
export base --out case/e
verify LONG
verify nowhere
verify base
verify good/out --base nowhere
eval good/out
eval good/out --data LONG
eval good/out --data nowhere.jsonl
eval good/out --data json
eval good/out --data train.jsonl --base base
eval good/out --data rows.jsonl --limit 0
eval good/out --data base
generate good/out
generate nowhere --prompt w5
generate LONG --prompt w5
generate good/out --prompt w5 --max-new-tokens 0
generate base --prompt w5
generate good/out --prompt w5 --base LONG
generate good/out --prompt SURROGATE
generate good/out --prompt w5 --base ~nobody-of-this-name/x
generate good/out --prompt w5 --base rows.jsonl
compare
compare no.yaml
compare LONG
compare s.yaml --workers 0
compare s.yaml --workers x
compare r.yaml
compare base
rows no.yaml
rows s.yaml
rows r.yaml --count -1
rows r.yaml --set data.train=nowhere.jsonl
methods x
doctor x
schema --out nowhere/x.json
schema --out base
schema --out LONG
subspace
subspace show nowhere
subspace show rows.jsonl
subspace show good/basis.safetensors --rank 0
subspace show base/model.safetensors
subspace extract good/out --out case/b
subspace extract good/out base --out case/b
subspace extract good/out good/out --out case/b
subspace extract LONG --out case/b
subspace extract good/out good/other --out base
subspace extract good/out good/other --out rows.jsonl/x
subspace extract good/out good/other --out case/b --width 0
--nonsense
train r.yaml --resume
SURROGATE
train s.yaml
"""


def words(draw: random.Random, number: int) -> Input:
    """A command line that typer or a command must refuse."""
    long = "x" * draw.choice([300, 5000])
    call = CALLS.strip().splitlines()[number % len(CALLS.strip().splitlines())]
    return Input([{"LONG": long, "SURROGATE": "\udc80"}.get(word, word) for word in call.split()])


def control(draw: random.Random, number: int) -> Input:
    """Good inputs: what refuses everything would pass the rest."""
    calls = [
        ["plan", "r.yaml"], ["plan", "r.yaml", "--json"], ["methods"], ["--version"], ["--help"], ["schema"],
        ["train", "r.yaml", "--set", "train.steps=2"], ["generate", "good/out", "--base", "base", "--prompt", "w5"],
        ["eval", "good/out", "--base", "base", "--data", "rows.jsonl", "--limit", "2"],
        ["subspace", "show", "good/basis.safetensors"],
        ["export", "good/out", "--base", "base", "--out", "case/e"],
        ["export", "good/out", "--base", "base", "--out", "case/e", "--profile", "gguf"],
        ["init", "r.yaml", "--set", "output=case/i"],
        ["plan", "r.yaml", "--set", "seed=010", "--set", "targets=.*(q|v)_proj"],
    ]  # fmt: skip
    return Input(calls[number % len(calls)], False)


INPUTS = (
    Kind("control", 13, control),
    Kind("recipe value", sum(map(len, KEYS.values())), value),
    Kind("method option", 150, option),
    Kind("recipe key", 80, key),
    Kind("broken recipe", 160, broken),
    Kind("override", 60, override),
    Kind("command line", 74, words),
)
