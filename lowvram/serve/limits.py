"""Every limit that protects the server from hostile or slow clients.

`Limits` holds what differs between servers; options of `lowvram serve` set some of it.  The constants hold for all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from lowvram.config.base import FrozenConfig

# Limits on one request's body besides its bytes.  Parsing blocks all other Python threads, so these are checked first.
MOST_MESSAGES = 10_000
MOST_PARTS = 10_000  # text parts of all messages together
MOST_CONTAINERS = 2 * (MOST_MESSAGES + MOST_PARTS)  # lists and objects; a message with parts has two
MOST_FIELDS = 10 * (MOST_MESSAGES + MOST_PARTS)  # names with a value; a message has at most eight
MOST_COMMAS = 2**20  # between values; a prompt of more ids is longer than any context
MOST_LEVELS = 16  # of nesting; a text part of a message is on the fifth
MOST_STOPS, LONGEST_STOP = 16, 500
MOST_TOP = 20  # OpenAI's bound of top_logprobs
# The range of --max-body: an empty question fits into the first, no context is as long as the second.
SMALLEST_BODY, LARGEST_BODY = 2**10, 256 * 2**20
# A body above the limit is read and thrown away up to so many times the limit, so that the client gets the refusal.
MOST_DRAINED = 16
# Requests that are parsed, normalised and tokenised at once: more would only take turns.
PREPARED_AT_ONCE = 2
# The largest --queue, and connections beyond those that can be answered: open pages, and clients that are refused.
LONGEST_QUEUE, MORE_CONNECTIONS = 10_000, 256
# Connections that the system holds until they are accepted (the socket's backlog).
BACKLOG = 128
# Bytes of an answer that the system buffers: with a larger buffer the progress of a slow client would be visible only
# once in megabytes.
SEND_BUFFER = 256 * 2**10
# Open files of the process besides connections: its libraries, mapped weights, files that it writes.
OWN_FILES = 48


class Limits(FrozenConfig):
    """Limits of one server.

    slots: answers written at once.  queue: requests that may wait for a slot, and likewise that may wait to be parsed.
    body_bytes: of one request.  prompt_tokens, output_tokens: of one request; neither can be more than the context.
    connections: open at once; when one more arrives, the connection that has been without a request, or has not read
    its answer, for the longest time is closed.
    header_bytes: of a request's first line and headers.  header_wait_s, body_wait_s: how long a request's headers, and
    its body, may take to arrive.  unread_wait_s: how long a client may read nothing of an answer that is sent to it.
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
