"""What a server takes on before it refuses: every limit against a hostile or a slow client stands here.

`Limits` holds what differs by server; `lowvram serve`'s options choose some of it.  The constants hold for all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from lowvram.config.base import FrozenConfig

# Of one request's body, on top of its bytes.  Parsing holds the interpreter, so the count is limited before it.
MOST_MESSAGES = 10_000
MOST_PARTS = 10_000  # text parts of all messages together
MOST_CONTAINERS = 2 * (MOST_MESSAGES + MOST_PARTS)  # lists and objects; a message with parts has two
MOST_FIELDS = 10 * (MOST_MESSAGES + MOST_PARTS)  # names with a value; a message has at most eight
MOST_COMMAS = 2**20  # between values; a prompt of more ids is longer than any context
MOST_LEVELS = 16  # a text part of a message lies on the fifth
MOST_STOPS, LONGEST_STOP = 16, 500
MOST_TOP = 20  # OpenAI's bound of top_logprobs
# What --max-body may be: an empty question fits into the first, no context is as long as the second.
SMALLEST_BODY, LARGEST_BODY = 2**10, 256 * 2**20
# Times the limit of a body that is read and thrown away, so that the client can read why it was refused.
MOST_DRAINED = 16
# Requests that are parsed, normalised and tokenised at once: more would only take turns.
PREPARED_AT_ONCE = 2
# What --queue may be, and connections beyond those that can be answered: pages that are open, clients that are refused.
LONGEST_QUEUE, MORE_CONNECTIONS = 10_000, 256
# Clients that the system lets wait until they are accepted.
BACKLOG = 128
# Of an answer, so much lies with the system unread; otherwise a slow client's reading would show once in megabytes.
SEND_BUFFER = 256 * 2**10
# Files of a process that are no connections: its libraries, mapped weights, what it writes.
OWN_FILES = 48


class Limits(FrozenConfig):
    """Bounds of one server.

    slots: answers written at once.  queue: requests that may wait for a slot, and those that may be read for it.
    body_bytes: of one request.  prompt_tokens, output_tokens: of one request; neither can be more than the context.
    connections: open at once; one more closes the one that has been without a request, or has not read its answer,
    for the longest time.
    header_bytes: of a request's first line and headers.  header_wait_s, body_wait_s: how long a request's headers, and
    its body, may take to come.  unread_wait_s: how long a client may read nothing of an answer that is sent to it.
    """

    slots: PositiveInt = 16
    queue: Annotated[int, Field(ge=0)] = 64
    body_bytes: PositiveInt = 4 * 2**20
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    connections: PositiveInt = 336
    header_bytes: PositiveInt = 64 * 2**10
    header_wait_s: PositiveFloat = 10.0
    body_wait_s: PositiveFloat = 30.0
    unread_wait_s: PositiveFloat = 60.0
