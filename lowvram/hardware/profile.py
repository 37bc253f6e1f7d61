"""The catalogue of cards: their properties, what tensors may take on them, and their names; never imports torch.

Every field is explained, with unit and source, in profiles/README.md.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from lowvram_kernels.capabilities import features_of
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from lowvram.config.base import FrozenConfig, Share, Size
from lowvram.errors import ConfigError, name_nearest
from lowvram.hardware.card_names import explain_unknown
from lowvram.units import parse_bytes, parse_memory, show_bytes

Fixed = Annotated[NonNegativeInt, BeforeValidator(parse_bytes)]
Number = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
Desktop = Literal["none", "linux", "windows"]
Capability = tuple[int, int]

_GIB = 2**30
# Up to this size Metal recommends the smaller share of memory (measured: 16 of 24 GiB, 21.3 of 32, but 48 of 64).
_SMALL_RAM_BYTES = 32 * _GIB


class Profile(FrozenConfig):
    """One card, or one kind of machine; the default sizes are those of a GeForce."""

    id: str
    name: str
    platform: Literal["cuda", "mps", "cpu"]
    capability: Capability | None = None

    memory_bytes: Size
    memory_range_bytes: tuple[Size, Size] | None = None
    unified: bool = False
    unified_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    unified_share_small: Annotated[float, Field(gt=0.0, le=1.0)] = 0.66
    reserved_bytes: Fixed = int(0.1 * _GIB)
    context_bytes: Fixed = int(0.45 * _GIB)
    workspace_bytes: Fixed = 8_519_680
    desktop_linux_bytes: Fixed = int(0.6 * _GIB)
    desktop_windows_bytes: Fixed = int(0.9 * _GIB)
    fragmentation: Share = 0.06
    host_process_bytes: Fixed = _GIB

    shared_memory_bytes: PositiveInt | None = None
    fp8: Literal["mxfp8", "tensor", "storage"]
    attention: Literal["flash", "efficient", "math"]

    bandwidth_bytes_per_s: PositiveFloat | None = None
    watts: PositiveFloat | None = None
    tflops: dict[Number, PositiveFloat] = Field(default_factory=dict)
    tflops_source: Literal["measured", "theory"] | None = None
    theory_tflops: PositiveFloat | None = None
    multiprocessors: PositiveInt | None = None
    boost_mhz: PositiveInt | None = None
    ai_tops: PositiveFloat | None = None
    uncertainty: Share
    sources: tuple[str, ...] = ()

    @property
    def dtype(self) -> Literal["fp16", "bf16"]:
        """The 16-bit format to train in: without tensor cores for it bf16 is 8 times slower than fp16."""
        return "bf16" if self.capability is None or features_of(self.capability).has_bf16 else "fp16"

    def limit_bytes(
        self, desktop: Desktop = "none", ram_bytes: int | None = None, free_bytes: int | None = None
    ) -> int:
        """Return the bytes that tensors may take.

        desktop: which desktop the same card draws.  ram_bytes: this machine's memory, used if card and host share it.
        free_bytes: what is free now; if it is less than the calculated bytes, it is used instead.
        """
        available = ram_bytes if self.unified and ram_bytes is not None else self.memory_bytes
        if self.unified:
            available = int(
                available * (self.unified_share if available > _SMALL_RAM_BYTES else self.unified_share_small)
            )
        available -= self.reserved_bytes
        if desktop != "none":
            available -= self.desktop_linux_bytes if desktop == "linux" else self.desktop_windows_bytes
        if free_bytes is not None:
            available = min(available, free_bytes)
        if self.platform == "cpu":
            available -= self.host_process_bytes
        return max(0, int((available - self.context_bytes) * (1 - self.fragmentation)) - self.workspace_bytes)

    def allocator_bytes(self, limit_bytes: int) -> int:
        """Return what the allocator may take if tensors may take limit_bytes: fragmentation and workspace included."""
        return int((limit_bytes + self.workspace_bytes) / (1 - self.fragmentation))


def profile_names() -> list[str]:
    """Return the ids of the catalogue, such as `rtx5070`, `m3-max`, `cpu`."""
    return sorted(path.stem for path in _find_folder().glob("*.toml"))


def measured_ids() -> list[str]:
    """Return the ids of the cards on which this project has measured its kernels, such as `h200`."""
    return sorted(path.stem for path in (_find_folder() / "measured").glob("*.json"))


def find_receipts() -> list[Path]:
    """Return the files of the receipts that were sent in, which ship with the catalogue."""
    return sorted((_find_folder() / "measured/receipts").glob("*.json"))


def load_profile(profile_id: str) -> Profile:
    """Return the profile with exactly this id; raises ConfigError that names the nearest ids."""
    if profile_id not in profile_names():
        raise ConfigError(f'There is no profile "{profile_id}".', fix=name_nearest(profile_id, profile_names()))
    text = (_find_folder() / f"{profile_id}.toml").read_text(encoding="utf-8")
    return Profile.model_validate(tomllib.loads(text) | {"id": profile_id})


def find_profile(text: str, memory_bytes: int | None = None) -> tuple[Profile, str]:
    """Return the profile for a name typed by a person or reported by a driver, and a sentence about assumptions, or "".

    text: such as `rtx5070`, `5070 ti`, `NVIDIA GeForce RTX 4070 Laptop GPU`, `rtx 5060 ti 16gb`, `m3 max`.
    memory_bytes: the memory that the card (or the machine, if they share it) is known to have; without it the smallest
    card of that name is taken.
    Raises ConfigError that names the nearest ids.
    """
    words, typed_bytes = _split_name(text)
    one_used = "A run uses one of the cards." if _COUNT.search(text.lower()) else ""
    family = [load_profile(name) for name in profile_names() if _split_name(name)[0] == words]
    if not family:
        raise ConfigError(f'The catalogue has no card "{text}".', fix=explain_unknown(text, profile_names()))
    known_bytes = typed_bytes if memory_bytes is None else memory_bytes
    family.sort(key=lambda profile: profile.memory_bytes)
    if known_bytes is None:
        return family[0], f"{_explain_assumed(family)} {one_used}".strip()
    nearest = min(family, key=lambda profile: abs(profile.memory_bytes - known_bytes))
    profile, note = _fit_memory(nearest, known_bytes)
    return profile, f"{note} {one_used}".strip()


def generic_profile(memory_bytes: int, name: str = "", capability: Capability = (8, 6)) -> Profile:
    """Return the profile of an NVIDIA card of which only the memory is known, and no speed.

    capability: as the driver reports it; by default that of RTX 30, whose kernels every later card can run too.
    """
    features = features_of(capability)
    return Profile(
        id="generic",
        name=name or f"NVIDIA card with {show_bytes(memory_bytes)}",
        platform="cuda",
        capability=capability,
        memory_bytes=memory_bytes,
        shared_memory_bytes=features.shared_bytes,
        fp8=features.fp8,
        attention="flash" if features.has_flash else "efficient",
        uncertainty=0.5,
    )


# Words that do not distinguish cards; other words do: "pcie", "laptop", "super".
_IGNORED = {"nvidia", "geforce", "rtx", "apple", "gpu", "graphics", "card", "chip", "silicon", "ram"}
# The same for cards of data centres: `Tesla T4`, `A100 Tensor Core GPU`, `colab l4`, `kaggle t4`.
_IGNORED |= {"tesla", "tensor", "core", "google", "colab", "kaggle"}
_MEMORY = re.compile(r"(?<!\d)[1-9]\d{0,3}(\.\d+)?\s*g(i?b)?\b")
_SOCKET = re.compile(r"\b(hbm|sxm)\d*e?\b")
# The computer that has an Apple chip: the "pro" in its name does not belong to the chip; any other "pro" does.
_COMPUTER = re.compile(r"\b(mac[ -]?book([ -]?(pro|air))?|mac[ -](mini|studio|pro)|i?mac)\b")
# The screen size or the year of such a computer: `14`, `16-inch`, `13.3"`, `2023`; a number before GB is memory.
_SCREEN = re.compile(r"\b(20[12]\d|1[1-7](\.\d)?|2[147](\.\d)?)\b(?!\s*g(i?b)?\b)([ -]?(inches|inch|in|inç)\b)?")
_WRITTEN_TOGETHER = re.compile(r"(super|laptop)")  # `4070tisuper`
_COUNT = re.compile(r"\b([2-8] ?x|x ?[2-8])\b")  # `T4 x2`, as Kaggle calls its two cards; each is one of them


def _split_name(text: str) -> tuple[frozenset[str], int | None]:
    """Return the words that distinguish a card from others, and the memory size in the name, None without one."""
    # A Turkish keyboard writes ı and İ where others write i.
    lower = _SOCKET.sub(" ", text.replace("ı", "i").replace("İ", "i").lower().replace("mobile", "laptop"))
    lower, computers = _COMPUTER.subn(" ", lower)
    lower = _SCREEN.sub(" ", lower) if computers else _COUNT.sub(" ", lower)
    memory = _MEMORY.search(lower)
    apart = _WRITTEN_TOGETHER.sub(r" \1 ", _MEMORY.sub(" ", lower))
    return frozenset(re.findall(r"[^\W\d_]+|\d+", apart)) - _IGNORED, parse_memory(memory[0]) if memory else None


def _explain_assumed(family: Sequence[Profile]) -> str:
    smallest, *larger = family
    taken = f"{show_bytes(smallest.memory_bytes)} is taken"
    if larger:
        return f"There are {_list_ids(family)}; the smallest is taken."
    if smallest.memory_range_bytes is not None:
        least, most = smallest.memory_range_bytes
        return f"{smallest.name} is sold with {show_bytes(least)} to {show_bytes(most)}; {taken}."
    return f"{taken} as the memory of the computer." if smallest.unified else ""


def _list_ids(family: Sequence[Profile]) -> str:
    *first, last = (profile.id for profile in family)
    return f"{', '.join(first)} and {last}"


def _fit_memory(profile: Profile, known_bytes: int) -> tuple[Profile, str]:
    """Return a profile with the memory that the card really has, and a note if it differs from the catalogue's.

    A difference of up to 10 % is ignored: drivers report less than is sold.
    """
    fitted = profile.model_copy(update={"memory_bytes": known_bytes})
    if profile.unified:
        return fitted, ""
    if abs(known_bytes - profile.memory_bytes) <= 0.1 * profile.memory_bytes:
        return profile, ""
    had = f"The catalogue knows {profile.name} with {show_bytes(profile.memory_bytes)}"
    return fitted, f"{had}; with {show_bytes(known_bytes)} its speed may be another."


def _find_folder() -> Path:
    """Return the catalogue's folder: inside the package of a wheel, or at the root of a checkout."""
    inside = Path(__file__).parents[1] / "profiles"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "profiles"
