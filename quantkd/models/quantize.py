"""A model in 4 bit with calibrated codes, as an ordinary bitsandbytes checkpoint."""

from __future__ import annotations

import logging
import shutil
from hashlib import sha256
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from torch import Tensor
from tqdm import tqdm
from transformers.utils.hub import extract_commit_hash

from quantkd.errors import ConfigError
from quantkd.files import new_folder, write_file
from quantkd.foreign import commit_of
from quantkd.hardware import parse_dtype, process_state
from quantkd.models.codes import calibrate_layer, moments_of
from quantkd.models.curvature import Costs, settle_layers
from quantkd.models.export import check_output_dir
from quantkd.models.gguf_codes import calibrate_gguf_layer
from quantkd.models.gguf_student import load_student_tokenizer
from quantkd.models.layer_inputs import Rows, draw_rows
from quantkd.models.network import base_network, context_length
from quantkd.models.original_weights import OriginalWeights, read_original
from quantkd.models.provenance import Provenance
from quantkd.models.stored_weights import describe_weights
from quantkd.models.student import (
    default_quantization_config,
    describe_config,
    describe_quantization,
    load_student,
    refuse_quantized,
)
from quantkd.models.weights import head_width
from quantkd.names import __version__, find_file, hub_arguments, is_repository_name, public_name
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.compatibility import check_student, check_transfer_set

logger = logging.getLogger(__name__)

ROWS = 256  # of calibration; docs/quantize.md has the figures
_SAMPLE = 4096  # bytes


def quantize(
    model: str | PathLike[str],
    transfer_set: TransferSet,
    output_dir: str | PathLike[str],
    *,
    quantization_config: Any | None = None,
    dtype: str | torch.dtype | None = None,
    rows: int = ROWS,
    seed: int = 0,
    progress: bool = True,
    **model_init_kwargs: Any,
) -> Path:
    """Quantize a model to 4 bit with codes that are chosen for the inputs of each layer.

    The checkpoint has the size, format and kernels of bitsandbytes' own, and `from_pretrained` loads it without
    quantkd. One pass over the rows is made; beside the model, one layer's weight and inputs are held.

    With `gguf_file` the codes of that file are chosen on its own grid, and the folder holds a file of the same name,
    size and metadata.

    Args:
        model: the full-precision checkpoint, a Hub name or a folder.
        transfer_set: its own answers, whose rows give the inputs; their distributions are not read.
        output_dir: a new folder. It appears when it is complete.
        quantization_config: `"nf4"` (the default), `"fp4"`, or a `BitsAndBytesConfig` in 4 bit.
        dtype: of the weights that stay, and of the 4-bit layers' products; by the hardware if None.
        rows: of the transfer set, drawn at random; fewer where their padded tokens would take too much memory
            (docs/quantize.md).
        seed: of the draw.
        progress: show a bar if there is a terminal.
        **model_init_kwargs: further arguments of `from_pretrained`, such as `revision`, or `gguf_file`.

    Returns:
        The folder.

    Raises:
        ConfigError: a checkpoint that is quantized already, a format without 4-bit codes, or a folder that exists.
        TransferSetError: a set that another tokenizer wrote.

    Reference: docs/quantize.md; Frantar et al. 2022 (arXiv:2210.17323).
    """
    name, path = fspath(model), check_output_dir(fspath(output_dir))
    if rows < 1:
        raise ConfigError(f"rows is {rows}; expected at least 1.")
    refuse_quantized(name, **model_init_kwargs)
    tokenizer = load_student_tokenizer(name, **model_init_kwargs)
    check_transfer_set(transfer_set, tokenizer, temperature=1.0, divergence="forward_kl")
    student = load_student(name, quantization_config=quantization_config, dtype=dtype, **model_init_kwargs)
    check_student(transfer_set, head_width(student), context_length(student))
    weights = OriginalWeights(name, student, model_init_kwargs.get("revision"))
    file = getattr(student, "gguf_file", None)
    calibrate(student, weights, draw_rows(transfer_set, rows, seed, student), progress=progress)
    made = {
        "form": "quantized", "codes": "calibrated", "commit": commit_of(student.config),
        **_identify(name, describe_quantization(student), quantization_config, rows, seed, **model_init_kwargs),
    }  # fmt: skip
    with new_folder(path) as folder:
        if file is None:
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            write_file(folder / file.path.name, file.data.data)
        facts = Provenance(transfer_set_digest=transfer_set.digest, weights=describe_weights(student), export=made)
        facts.write(folder)
    return path


def quantize_once(
    model: str,
    transfer_set: TransferSet,
    folder: Path,
    *,
    quantization_config: Any | None = None,
    dtype: Any = None,
    seed: int = 0,
    **kwargs: Any,
) -> None:
    """`quantize` by the main process, unless the folder holds what it would write; that of another call is replaced."""
    if process_state().is_main_process:
        config = "nf4" if quantization_config is None else quantization_config
        config = default_quantization_config(parse_dtype(dtype), config) if isinstance(config, str) else config
        given, folder = folder, folder.resolve()
        new = folder.with_name(f".{folder.name}.new")  # where that of a run that was killed is found again
        wanted = _identify(model, describe_config(config), config, ROWS, seed, **kwargs)

        def is_wanted(place: Path) -> bool:
            facts = Provenance.read(place)
            made = facts.export or {}
            return facts.transfer_set_digest == transfer_set.digest and wanted.items() <= made.items()

        if not is_wanted(folder):
            if (Provenance.read(folder).export or {}).get("form") != "quantized":
                check_output_dir(str(folder))
            if not is_wanted(new):
                shutil.rmtree(new, ignore_errors=True)
                quantize(model, transfer_set, new, quantization_config=config, dtype=dtype, seed=seed, **kwargs)
            if is_wanted(folder):  # by now: another process was faster
                shutil.rmtree(new)
            else:
                if folder.exists():
                    logger.warning(
                        "%s is replaced: it was made of another model, set, format, seed or version. Adapters that "
                        "were trained on it fit no other checkpoint. Use another output folder to keep them.",
                        given,
                    )
                    shutil.rmtree(folder)
                new.rename(folder)
    process_state().wait_for_everyone()


def calibrate(model: Any, weights: OriginalWeights, rows: Rows, *, progress: bool = True) -> int:
    """Choose the codes of every layer of bitsandbytes in 4 bit, or of GGUF, anew; how many were. Others stay."""
    from bitsandbytes.nn.modules import Linear4bit

    named: dict[Any, str] = {
        layer: name
        for name, layer in base_network(model).named_modules()
        if isinstance(layer, Linear4bit) or hasattr(layer, "gguf_tensor")
    }
    if not named:
        raise ConfigError("The model has no 4-bit layer of bitsandbytes. Codes are chosen for GGUF, nf4 and fp4 alone.")

    def choose(layer: Any, inputs: Tensor | None, costs: Costs | None) -> None:
        original = read_original(weights, named[layer], layer)
        if inputs is None:
            raise ConfigError("no token reaches it.")
        moments = moments_of(inputs, costs)  # each layer's own, for tokens have weights by layer
        if hasattr(layer, "gguf_tensor"):
            calibrate_gguf_layer(layer, model.config, original, *moments)
        else:
            calibrate_layer(layer, original, *moments)

    bar = tqdm(total=len(named), desc="codes", unit="layer", disable=None if progress else True)
    refused = settle_layers(model, named, choose, rows, bar)
    first = "".join("That of {}: {}".format(*each) for each in [*refused.items()][:1])
    if len(refused) == len(named):
        raise ConfigError(f"The codes of no layer could be chosen. {first}")
    if refused:
        logger.warning("%d of %d layers keep their nearest codes. %s", len(refused), len(named), first)
    return len(named) - len(refused)


def read_origin(name_or_path: str) -> dict[str, Any]:
    """What `quantize` wrote of a checkpoint; nothing if another wrote it, or if it is not there any more."""
    if Path(name_or_path).is_file():  # a GGUF file, beside which it stands
        name_or_path = str(Path(name_or_path).parent)
    try:
        return (Provenance.read(name_or_path).export or {}) if name_or_path else {}
    except RepositoryNotFoundError:  # a loaded model may have the name of a folder that was moved, or any
        return {}


def find_origin(name_or_path: str) -> tuple[str, str | None] | None:
    """The full-precision checkpoint of a folder of `quantize`, and its commit; None if it is not known or not here."""
    made = read_origin(name_or_path)
    origin, commit = made.get("quantized_from"), made.get("commit")
    if not isinstance(origin, str):
        return None
    if is_repository_name(origin):
        return origin, commit if isinstance(commit, str) and commit else None
    # Of a local folder the name alone is stored: it is looked for beside the checkpoint, and here.
    places = (Path(name_or_path).resolve().parent / origin, Path(origin))
    return next(((str(place), None) for place in places if (place / "config.json").is_file()), None)


def _identify(name: str, quantization: Any, config: Any, rows: int, seed: int, **kwargs: Any) -> dict[str, Any]:
    """What tells a checkpoint from others that `quantize` would write from the same set."""
    return {
        "quantized_from": public_name(name), "quantization": quantization, "rows": rows, "seed": seed,
        "skipped_modules": sorted(getattr(config, "llm_int8_skip_modules", None) or []),
        "quantkd_version": __version__, **_identify_origin(name, **kwargs),
    }  # fmt: skip


def _identify_origin(name: str, **model_init_kwargs: Any) -> dict[str, str]:
    """What tells a model from others of its name: its commit; of a folder, a digest of samples of its weights."""
    if not Path(name).is_dir():
        config = find_file(name, "config.json", **hub_arguments(model_init_kwargs))
        return {"commit": str(extract_commit_hash(str(config), None) or "")}
    digest = sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(_SAMPLE, size // 256)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return {"samples_sha256": digest.hexdigest()}
