"""Whether a base model can be had from the Hub: asked once, before transformers asks many times."""

from __future__ import annotations

import logging

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from shared.errors import UserError, one_line
from shared.hub import open_hub

log = logging.getLogger(__name__)

_FIRST = "config.json"  # every model has one, and transformers asks for it first


def answers_for(model_id: str) -> bool:
    """Whether the Hub gives `model_id`; False when the cache alone is to serve.

    Where nobody answers transformers would repeat each of its ten requests for a minute; this ends
    within 15 seconds. What is not in the cache will be fetched, and a log line says so.
    Raises UserError for a name that cannot be an id, and for a model that neither the Hub nor the
    cache gives.
    """
    try:
        is_cached = isinstance(try_to_load_from_cache(model_id, _FIRST), str)
    except HFValidationError:
        raise UserError(
            f"the model {model_id} is no directory here, and no id of the Hub, owner/name: give "
            "its directory or its id"
        ) from None
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE forbids to fetch it: unset it"
    else:
        problem = _problem(model_id)
    if problem and not is_cached:
        raise UserError(
            f"{model_id} is no directory here and not in the cache {constants.HF_HUB_CACHE}, and "
            f"{problem}; or give --model_name a local path"
        )
    if problem:
        log.info("%s is taken from the cache: %s", model_id, problem)
    elif not is_cached:
        log.info(
            "%s is fetched from %s into %s (LLaVA-v1.6-Mistral-7B: 15 GB)",
            *(model_id, constants.ENDPOINT, constants.HF_HUB_CACHE),
        )
    return not problem


def _problem(model_id: str) -> str:
    """Why the Hub does not give the model, or ''."""
    try:
        open_hub(model_id, "main", endpoint=constants.ENDPOINT)
    except UserError as error:
        return one_line(error)
    return ""
