"""Models and tokenizers of transformers, from a folder or from the local cache of the Hugging Face hub.

Nothing is downloaded unless the workload's argument ``download`` says so, and transformers' own HF_HUB_OFFLINE forbids
it even then. Weights are read from safetensors alone, nothing is unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fimo.workers.errors import FimoError, UsageError
from fimo.workers.workloads.files import extra

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What is fetched of a model: its configuration, tokenizer and weights."""


def find(model: Path, download: bool) -> Path:
    """The folder of a model: ``model`` itself, or its snapshot in the local cache of the hub.

    Args:
        model: a folder with config.json, or a name on the hub, such as bert-base-uncased.
        download: fetch what the cache lacks.

    Raises:
        UsageError: there is no such model here, or transformers is not installed.
    """
    extra("transformers", "text")
    if model.is_dir():
        if not (model / "config.json").is_file():
            raise UsageError(f"model {model} has no config.json: name a folder that save_pretrained wrote")
        return model
    from huggingface_hub import snapshot_download

    # Look in the cache by the hub's own means: transformers asks the network even if told not to.
    try:
        return Path(snapshot_download(model.as_posix(), local_files_only=not download, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's errors have many bases
        said = (str(error).strip().splitlines() or [""])[0][:160]
        wrong, mend = "is no folder, nor in the cache", "name a folder with config.json and model.safetensors"
        if download:
            wrong = f"cannot be downloaded ({type(error).__name__}: {said})"
        else:
            mend += ", or fetch it from the Hugging Face hub by workload_args: {download: true}"
        raise UsageError(f"model '{model}' {wrong}: {mend}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Run the body without transformers' reports and progress bars."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load(folder: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` reads from ``folder`` with transformers, its complaints in one line.

    Raises:
        UsageError: transformers does not take what is in the folder.
    """
    try:
        with quiet():
            return make()
    except FimoError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"model {folder} cannot be loaded ({type(error).__name__}: {said})") from error


def config(folder: Path) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    return load(folder, lambda: AutoConfig.from_pretrained(folder, local_files_only=True))


def tokenizer(folder: Path) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return load(folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))


def weights(folder: Path, auto: str, initial: int | None, **options: Any) -> nn.Module:
    """The folder's model in float32 and eval mode.

    Args:
        auto: a class of transformers, such as AutoModelForCausalLM.
        initial: None = the folder's weights; else the architecture's random initialisation under this seed.
        options: for the model's constructor.
    """
    import transformers

    from fimo.workers.workloads.recipe import network

    kind = getattr(transformers, auto)

    def read() -> nn.Module:
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
        return model

    def make() -> nn.Module:
        model: nn.Module = kind.from_config(config(folder), **options)
        return model

    model: nn.Module = load(folder, read if initial is None else lambda: network(make, initial))
    # Checkpoints are kept in half precision too; a float32 copy of them is exact.
    return model.to(torch.float32).eval()


def without_numbers(model: nn.Module) -> nn.Module:
    """``model`` with its parameters on the meta device, ties kept: refused as a start unless given a final model.

    Its buffers stay: those that no state dict holds (positions, causal masks) are a part of the architecture.
    """
    absent: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                bare = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = absent.setdefault(id(parameter), bare)
    return model
