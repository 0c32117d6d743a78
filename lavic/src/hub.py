"""Whether a base model can be had from the Hub: asked once, before transformers asks many times."""

from __future__ import annotations

import contextlib
import logging

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers

from shared.errors import UserError, one_line
from shared.transport import PATIENCE, Line, Patience, hub_advice, refusal

log = logging.getLogger(__name__)

_FIRST = "config.json"  # every model has one, and transformers asks for it first


def answers_for(model_id: str, patience: Patience = PATIENCE) -> bool:
    """Whether the Hub gives `model_id`; False when the cache alone is to serve.

    Where nobody answers transformers would repeat each of its ten requests for a minute; this ends
    within 15 seconds. What is not in the cache will be fetched, and a log line says so.
    Raises UserError for a name that cannot be an id, and for a model that neither the Hub nor the
    cache gives.
    """
    try:
        is_cached = isinstance(try_to_load_from_cache(model_id, _FIRST), str)
        url = hf_hub_url(model_id, _FIRST)
    except HFValidationError:
        raise UserError(
            f"the model {model_id} is no directory here, and no id of the Hub, owner/name: give "
            "its directory or its id"
        ) from None
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE forbids to fetch it: unset it"
    else:
        problem = _problem(url, model_id, patience)
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


def _problem(url: str, model_id: str, patience: Patience) -> str:
    """Why `url` is not given, or ''."""
    line = Line(patience, build_hf_headers(), hub_advice(constants.ENDPOINT))
    what = f"the model {model_id}"

    def ask() -> None:
        with contextlib.closing(line.open(url, 0, what)) as response:
            if response.is_error:
                raise refusal(response, what, line.advice)

    try:
        line.persist(ask)
    except UserError as error:
        return one_line(error)
    return ""
