"""What a server takes on before it refuses; plain numbers, chosen by `lowvram serve`'s options."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from lowvram.words import Words


class Limits(Words):
    """Bounds of one server.

    slots: answers written at once.  queue: requests that may wait for a slot.  body_bytes: of one request.
    prompt_tokens, output_tokens: of one request; neither can be more than the context.
    """

    slots: PositiveInt = 16
    queue: Annotated[int, Field(ge=0)] = 64
    body_bytes: PositiveInt = 4 * 2**20
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
