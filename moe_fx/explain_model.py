"""``moe-fx explain MODEL``: explain one of transformers' models from its configuration alone.

What is matched depends on shapes and code, not on weights, so the model is built of FakeTensors: the largest one takes
neither memory nor time, and no weights are loaded.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from moe_fx.errors import MissingToolchainError, MoeFxError, OptionError, UnsupportedError
from moe_fx.explanation import Explanation, explain

__all__ = ["explain_pretrained"]

# Fields of configurations that count the dense layers before the first sparse one.
_DENSE_LAYER_COUNTS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_FEWEST_LAYERS = 2


def explain_pretrained(
    model: str,
    *,
    layers: int | None = None,
    tokens: int = 16,
    dtype: str = "bfloat16",
    experts_implementation: str | None = None,
    dynamic: bool | None = None,
    trust_remote_code: bool = False,
) -> Explanation:
    """Explain a model of the transformers library without weights.

    Args:
        model: a model type (``qwen3_moe``: its default configuration), a checkpoint's folder or its ``config.json``,
            or a name that transformers can look up.
        layers: build the first that many; default: as few as hold every kind of layer that the model has.
        tokens: length of the one traced sequence.
        dtype: name of the model's dtype.
        experts_implementation: transformers' spelling of the experts; default: its own choice.
        dynamic: as for ``torch.compile``.
        trust_remote_code: let transformers run code that comes with the model.

    Raises:
        MissingToolchainError: transformers is not installed.
        OptionError: no such model type, folder or file; the message lists close matches.
        UnsupportedError: the model cannot be built or run this way.
    """
    transformers = _transformers()
    config = _config(transformers, model, trust_remote_code)
    whole = config.num_hidden_layers
    count = min(layers or _layers_of_every_kind(config), whole)
    _truncate(config, count)
    choice = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            # Dynamo's remarks on the model's code: it is not the user's.
            warnings.simplefilter("ignore", UserWarning)
            built = _auto_class(transformers, config).from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **choice
            )
            ids = torch.zeros(1, tokens, dtype=torch.long)
            explanation = explain(built.eval(), input_ids=ids, use_cache=False, dynamic=dynamic)
    except MoeFxError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedError(
            f"'{model}' could not be built and traced without weights ({type(error).__name__}: {first_line}); "
            "a type's default configuration may be incomplete: give the config.json of a checkpoint, "
            "or load the model yourself and call moe_fx.explain(model, ...)"
        ) from error
    explanation.notes.append(f"{count} of {whole} layers, from the configuration alone: no weights were loaded")
    return explanation


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingToolchainError(
            f"explaining a model by name needs transformers ({error}); pip install 'moe-fx[models]'"
        ) from error


def _config(transformers: Any, model: str, trust_remote_code: bool) -> Any:
    """The configuration of the model's decoder."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise OptionError(f"the folder '{model}' holds no config.json, so it is no checkpoint of transformers")
    if path.exists() or "/" in model:
        try:
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise OptionError(f"transformers finds no configuration for '{model}': {first_line}") from error
    elif model in known:
        config = transformers.AutoConfig.for_model(model)
    else:
        close = difflib.get_close_matches(model.lower().replace("-", "_"), list(known), n=5, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise OptionError(f"'{model}' is no model type of transformers, no folder and no config.json{hint}")
    config = config.get_text_config(decoder=True)
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UnsupportedError(f"'{model}' has no num_hidden_layers in its configuration, so it is no decoder")
    return config


def _auto_class(transformers: Any, config: Any) -> Any:
    """The language model where there is one, else the bare model."""
    causal = transformers.AutoModelForCausalLM
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    return causal if remote or type(config) in causal._model_mapping else transformers.AutoModel


def _layers_of_every_kind(config: Any) -> int:
    """The fewest layers in which every kind of layer occurs, the sparse one above all."""
    count = _FEWEST_LAYERS
    for name in _DENSE_LAYER_COUNTS:
        dense = getattr(config, name, None)
        if isinstance(dense, int):
            count = max(count, dense + 1)
    for _, kinds in _per_layer_lists(config):
        if all(isinstance(kind, str) for kind in kinds):
            count = max(count, 1 + max(kinds.index(kind) for kind in set(kinds)))
    return count


def _truncate(config: Any, count: int) -> None:
    """Keep the first layers; lists that describe one layer each must agree with their number."""
    for name, kinds in list(_per_layer_lists(config)):
        setattr(config, name, kinds[:count])
    config.num_hidden_layers = count


def _per_layer_lists(config: Any) -> Iterator[tuple[str, list[Any]]]:
    for name, given in vars(config).items():
        if isinstance(given, list) and len(given) == config.num_hidden_layers:
            yield name, given
