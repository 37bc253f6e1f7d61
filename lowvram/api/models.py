"""A trained model that writes text, talks and is exported, as one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from lowvram.api.tasks import Notice, finish

if TYPE_CHECKING:
    from lowvram.api.exporting import Dtype, Format
    from lowvram.api.loading import LoadedModel
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.engine import Counts, Engine
    from lowvram.generate.precision import Precision
    from lowvram.generate.sampling import Sampler
    from lowvram.model.kv_cache import CacheFormat

# As `lowvram chat --tokens` has it.
DEFAULT_TOKENS = 128


def load(
    path: str | Path,
    *,
    precision: Precision | None = None,
    device: str = "auto",
    max_context: int | None = None,
    cache: Literal["plain", "fp8"] = "plain",
) -> Model:
    """Load a model to talk to: a run's newest checkpoint, the one named, or a directory that was exported.

    precision: of the weights ("fp8", "int8", "bf16", "fp32"), None: the card's choice.  device: "cuda", "mps", "cpu"
    or "auto".  max_context: tokens of a text with its answer, None: what the model is made for, or what fits.
    cache: "fp8" keeps MLA's latents in 8 bits.
    Raises CheckpointError where there is no checkpoint that can be read, ConfigError for a cache that this attention
    does not have, MachineError where the device is not here or so long a text does not fit.
    """
    from lowvram.api.arguments import PATH, refuse_count, refuse_missing
    from lowvram.api.context import find_max_context
    from lowvram.api.loading import load_model
    from lowvram.errors import refuse_unknown

    refuse_missing("path", path, *PATH)
    refuse_missing("device", device, str)
    refuse_count("max_context", max_context)
    refuse_unknown("cache", cache, ("plain", "fp8"))
    loaded, notices = finish(load_model(Path(path), device, precision))
    cache_format = choose_cache(loaded, cache)
    context, more = finish(find_max_context(loaded, 1, max_context, cache_format))
    if context.warning:
        more = (*more, Notice(context.warning, "warning"))
    return Model(loaded, context.max_context, cache_format, notices + more)


def choose_cache(loaded: LoadedModel, asked: str) -> CacheFormat:
    """Return the format of a model's cache; raises ConfigError where its attention has no such format."""
    from lowvram.errors import ConfigError

    if asked == "fp8" and loaded.config.attention.kind != "mla":
        raise ConfigError(
            '`cache="fp8"` is given, and this model\'s attention is GQA.',
            "Only MLA's latents are kept in 8 bits.",
            "Leave it out.",
        )
    return "e4m3" if asked == "fp8" else "plain"


class Model:
    """A model on its device.

    max_context: tokens of a text with its answer.  notices: what was said when it was loaded.  What was read of a text
    is kept, so that a text that begins with the last one costs only what is new.
    """

    def __init__(
        self, loaded: LoadedModel, max_context: int, cache: CacheFormat = "plain", notices: tuple[Notice, ...] = ()
    ) -> None:
        self.loaded, self.max_context, self.notices = loaded, max_context, notices
        self._cache = cache
        self._opened: Engine | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model."""
        return self.loaded.tokenizer

    @property
    def precision(self) -> str:
        """The precision of the weights: "fp8", "int8", "bf16", "fp16" or "fp32"."""
        return self.loaded.precision

    @property
    def ended(self) -> Literal["text", "tokens", "context"]:
        """Why the last answer ended: the model ended it, max_tokens were written, or the context was full."""
        return self._engine().ended

    @property
    def counts(self) -> Counts:
        """The tokens and seconds that the last answer took."""
        return self._engine().counts

    @overload
    def generate(
        self, prompt: str, *, max_tokens: int = ..., newest: bool = ..., stream: Literal[False] = ..., **sampling: float
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str, *, max_tokens: int = ..., newest: bool = ..., stream: Literal[True], **sampling: float
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = DEFAULT_TOKENS,
        newest: bool = False,
        stream: bool = False,
        **sampling: float,
    ) -> str | Iterator[str]:
        """Return what the model writes behind a prompt; with `stream`, its pieces as it writes them.

        newest: of a prompt that is too long, read the newest part that fits.  sampling: temperature, top_k, top_p,
        min_p, repetition_penalty, seed; see `Sampler`.  The same seed gives the
        same text, which is the one that `lowvram chat --prompt` prints.
        Raises PromptTooLongError where the prompt leaves no room for an answer, PromptError where it is not UTF-8,
        ConfigError for a sampler that is out of range.
        """
        from lowvram.api.arguments import refuse_count, refuse_missing, refuse_type
        from lowvram.api.typed_text import read_typed
        from lowvram.generate.conversation import Conversation

        refuse_missing("prompt", prompt, str)
        refuse_count("max_tokens", max_tokens)
        refuse_type("stream", stream, bool)
        sampler = build_sampler(sampling, also=("max_tokens", "newest", "stream"))
        pieces = Conversation(self._engine()).ask(read_typed(prompt), sampler, max_tokens, newest)
        return pieces if stream else "".join(pieces)

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        system: str | None = ...,
        max_tokens: int = ...,
        newest: bool = ...,
        stream: Literal[False] = ...,
        **sampling: float,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        system: str | None = ...,
        max_tokens: int = ...,
        newest: bool = ...,
        stream: Literal[True],
        **sampling: float,
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        system: str | None = None,
        max_tokens: int = DEFAULT_TOKENS,
        newest: bool = False,
        stream: bool = False,
        **sampling: float,
    ) -> str | Iterator[str]:
        """Return the model's answer in a conversation; with `stream`, its pieces as it writes them.

        messages: what the user says, or all turns so far as {"role": "user" | "assistant", "content": …}, the user's
        last.  system: what the model is told first.  newest, sampling: as for `generate`.  A model of plain
        text has not learnt to answer in turns: `generate` suits it.
        Raises TokenizerError where the model has no chat template, PromptError where the last message is not the user's
        or what the system says leaves no room, PromptTooLongError where the user's message leaves none.
        """
        from lowvram.api.arguments import refuse_count, refuse_type
        from lowvram.api.typed_text import read_typed
        from lowvram.errors import PromptError
        from lowvram.generate.chat_template import Message, choose_template
        from lowvram.generate.conversation import Conversation

        refuse_type("system", system, str)
        refuse_count("max_tokens", max_tokens)
        refuse_type("stream", stream, bool)
        sampler = build_sampler(sampling, also=("max_tokens", "newest", "stream", "system"))
        turns = _read_turns(messages)
        if not turns or turns[-1].get("role") != "user":
            raise PromptError("The last message is not the user's.", "The model answers what a user says.", "Add that.")
        *before, last = [Message(turn["role"], read_typed(turn["content"])) for turn in turns]
        if before and before[0].role == "system":
            system, before = before[0].content, before[1:]
        conversation = Conversation(
            self._engine(),
            choose_template(self.tokenizer, "dialogue"),
            read_typed(system) if system else None,
            before,
        )
        pieces = conversation.ask(last.content, sampler, max_tokens, newest)
        return pieces if stream else "".join(pieces)

    def export(
        self,
        out: str | Path,
        *,
        to: Format = "hf",
        dtype: Dtype | None = None,
        license: str | None = None,
        language: str = "tr",
        verify: str | Path | None = None,
    ) -> Path:
        """Write the checkpoint that was loaded for another program, from its masters, whatever was loaded here.

        out: a directory, for gguf a file; must not exist.  The other parameters: see `ExportSettings`.
        Raises ConfigError for options that do not go together, CheckpointError where `out` exists or another program
        wrote this model, ExportError where the other program cannot compute it.
        """
        from lowvram.api.arguments import PATH, refuse_missing, refuse_type
        from lowvram.api.exporting import ExportSettings, compare_with_llama_cpp, export_task

        refuse_missing("out", out, *PATH)
        refuse_missing("to", to, str)
        refuse_type("dtype", dtype, str)
        refuse_type("license", license, str)
        refuse_missing("language", language, str)
        refuse_type("verify", verify, *PATH)
        options = ExportSettings(to, dtype, license, language, Path(verify) if verify is not None else None)
        exported, _ = finish(export_task(self.loaded.path, Path(out), options))
        if exported.comparison is not None:
            finish(compare_with_llama_cpp(exported.comparison))
        return exported.path

    def _engine(self) -> Engine:
        from lowvram.generate.decoder import Decoder
        from lowvram.generate.engine import Engine

        if self._opened is None:
            loaded = self.loaded
            decoder = Decoder(loaded.model, self.max_context, dtype=loaded.dtype, cache=self._cache)
            self._opened = Engine(decoder, loaded.tokenizer)
        return self._opened


def _read_turns(messages: object) -> list[Mapping[str, str]]:
    """Return the turns of a conversation; raises ConfigError where they are not what `Model.chat` takes."""
    from lowvram.api.arguments import refuse_missing
    from lowvram.errors import ConfigError, argument

    refuse_missing("messages", messages, str, list, tuple)
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    assert isinstance(messages, list | tuple), "else it was refused"
    for number, turn in enumerate(messages):
        values = [turn.get("role"), turn.get("content")] if isinstance(turn, Mapping) else [None]
        if not all(isinstance(value, str) for value in values):
            what = f"Turn {number} of {argument('messages')} has no text as role and as content."
            raise ConfigError(what, fix='Write each as {"role": "user", "content": "Merhaba"}.')
    return list(messages)


def build_sampler(values: Mapping[str, object], spell: Callable[[str], str] = str, also: Sequence[str] = ()) -> Sampler:
    """Return the sampler of these values.

    spell: returns how the user writes a name.  also: other names that the user can give beside them.  Raises
    ConfigError naming the value that is not known or out of range.
    """
    from pydantic import ValidationError

    from lowvram.config.allowed import describe_allowed
    from lowvram.errors import ConfigError, name_nearest
    from lowvram.generate.sampling import Sampler

    for name in values:
        if name not in Sampler.model_fields:
            raise ConfigError(f"There is no {spell(name)}.", fix=name_nearest(name, [*Sampler.model_fields, *also]))

    try:
        return Sampler.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        name = spell(str(problem["loc"][0]))
        raise ConfigError(f"{name} is {problem['input']}; {describe_allowed(problem)}.") from error
