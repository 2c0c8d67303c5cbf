"""What each column of a row means.

A *site* is one adapted module. Its `lora_A` writes `rank` scalars per token, which are `rank`
neighbouring columns of the row. A `SiteLayout` lists the sites in column order: layer-major,
inside a layer gate, up, down, q, k, v, o (then any other name, alphabetically), inside a site by
rank index. Every artifact holds its layout, and two artifacts are used together only if their
layouts agree.

A joint layout has the sites of several adapters of one base, those of the first adapter first: each
of its sites names its adapter.

A projection is named by the last part of its module's path: `gate_proj`. If several modules of a
layer share the last part, more parts are added until they differ: `attn.c_proj` and `mlp.c_proj`.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import ArtifactError, ConfigError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
TRAINING = "training:"  # before the digest of the weights that a logged training began with
_GROUPS = {"mlp": PROJECTIONS[:3], "attention": PROJECTIONS[3:]}
_INITIALS = {name: name[0] for name in PROJECTIONS}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted module.

    `layer` is -1 if the module's path has no layer number. PEFT multiplies `B(A(x))` by `scale`.
    `b_norms[i]` is the Euclidean norm of column i of `B`; it counts as 1.0 if `b_norms` is empty.
    `lora_kind` is `lora`, or the variant of LoRA that the module uses, such as `dora`. `gauge` is
    `raw` if the columns are those of the file's `A`, and `svd` if they are the singular directions
    of `scale·B·A`; then `b_norms` belong to the matching `B`. `adapter` names one of several in a
    joint layout; it is empty where there is only one.
    """

    layer: int
    projection: str
    rank: int = 1
    module: str = ""
    scale: float = 1.0
    b_norms: tuple[float, ...] = ()
    lora_kind: str = "lora"
    gauge: str = "raw"
    adapter: str = ""

    @property
    def name(self) -> str:
        """Name of the site: `3.gate_proj`, or `A:3.gate_proj` of the adapter A."""
        return self._of_adapter(
            f"{self.layer}.{self.projection}" if self.layer >= 0 else self.module
        )

    @property
    def path(self) -> str:
        """Path of the module, with the adapter's name before it where there are several."""
        return self._of_adapter(self.module)

    def _of_adapter(self, name: str) -> str:
        return f"{self.adapter}:{name}" if self.adapter else name

    @property
    def order(self) -> tuple[str, int, int, str, str]:
        """Sort key of the column order: adapters, layers; sites outside any layer come last."""
        known = self.projection in PROJECTIONS
        position = PROJECTIONS.index(self.projection) if known else len(PROJECTIONS)
        layer = self.layer if self.layer >= 0 else 1 << 30
        return (self.adapter, layer, position, self.projection, self.module)


@dataclass(frozen=True)
class SiteLayout:
    """The sites of a row in column order, and the digest of the adapter that they belong to.

    `adapter` is None for stores that the published scripts wrote, which do not record it. Such a
    store goes with any artifact of the same sites. Stores of a training that was logged have
    `TRAINING` and a digest of the weights that it began with: they go together, and with adapter
    files of the same sites, but not with stores of another training.
    """

    sites: tuple[Site, ...]
    adapter: str | None = None

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(self.sites, key=lambda site: site.order):
            raise ValueError("sites must come in column order; use SiteLayout.from_sites")
        for site in self.sites:
            if site.b_norms and len(site.b_norms) != site.rank:
                raise ValueError(f"{site.name}: {len(site.b_norms)} norms for rank {site.rank}")

    @classmethod
    def from_sites(cls, sites: Sequence[Site], adapter: str | None = None) -> "SiteLayout":
        """Make a layout from sites in any order."""
        return cls(tuple(sorted(sites, key=lambda site: site.order)), adapter)

    @classmethod
    def joint(cls, layouts: Mapping[str, "SiteLayout"]) -> "SiteLayout":
        """Return the layout of several adapters' columns: all of the first name's, and so on.

        Names must be in rising order. Raises ValueError if they are not.
        """
        sites = [
            replace(site, adapter=name) for name, layout in layouts.items() for site in layout.sites
        ]
        digests = json.dumps([layout.adapter for layout in layouts.values()])
        return cls(tuple(sites), hashlib.sha256(digests.encode()).hexdigest())

    def columns_of(self, adapter: str) -> npt.NDArray[np.int64]:
        """Return the columns of one of the adapters of a joint layout."""
        here = [site.adapter == adapter for site in self.sites for _ in range(site.rank)]
        return np.flatnonzero(here)

    @cached_property
    def d_in(self) -> int:
        """Number of columns: the sum of the ranks."""
        return sum(site.rank for site in self.sites)

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns: the site's name, with `:i` for rank index i where rank > 1."""
        return tuple(
            site.name if site.rank == 1 else f"{site.name}:{i}"
            for site in self.sites
            for i in range(site.rank)
        )

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each site."""
        ends = itertools.accumulate(site.rank for site in self.sites)
        return tuple(slice(end - s.rank, end) for end, s in zip(ends, self.sites, strict=True))

    @property
    def writes_nothing(self) -> bool:
        """Whether every `B` is zero, so that no row has an effect."""
        return bool(self.sites) and not self.effect_scale.any()

    @cached_property
    def effect_scale(self) -> npt.NDArray[np.float64]:
        """`scale * ||B column||` of every column, `(d_in,)`: what one unit of `h` writes."""
        return np.array(
            [
                site.scale * (site.b_norms[i] if site.b_norms else 1.0)
                for site in self.sites
                for i in range(site.rank)
            ],
            dtype=np.float64,
        )

    @cached_property
    def adapter_types(self) -> tuple[str, ...]:
        """The projections in the layout, in column order."""
        return in_column_order(site.projection for site in self.sites)

    @cached_property
    def initials(self) -> str:
        """The projections' initials joined by `-`, as in the published file names."""
        return join_initials(self.adapter_types)

    def select(self, adapter_types: Sequence[str]) -> tuple["SiteLayout", npt.NDArray[np.int64]]:
        """Return the layout of the named projections and their columns in this layout.

        Raises ConfigError when a projection is not in the layout.
        """
        missing = [name for name in adapter_types if name not in self.adapter_types]
        if missing:
            raise ConfigError(
                f"adapter type {missing[0]} is not among the store's: "
                f"{', '.join(self.adapter_types)}"
            )
        ends = np.cumsum([site.rank for site in self.sites])
        kept = [i for i, site in enumerate(self.sites) if site.projection in adapter_types]
        columns = [np.arange(ends[i] - self.sites[i].rank, ends[i]) for i in kept]
        layout = replace(self, sites=tuple(self.sites[i] for i in kept))
        return layout, np.concatenate(columns).astype(np.int64)

    def require_same(self, other: "SiteLayout", here: str, there: str) -> None:
        """Raise ArtifactError unless both layouts describe the same columns of one adapter."""
        if self.d_in != other.d_in:
            found = f"{here} has d_in {self.d_in}, {there} has {other.d_in}"
        elif self._columns() != other._columns():
            found = f"{here} has columns {self._summary()}, {there} has {other._summary()}"
        elif self._is_of_another(other):
            names = [str(one.adapter).removeprefix(TRAINING)[:12] for one in (self, other)]
            what = "training" if str(self.adapter).startswith(TRAINING) else "adapter"
            found = f"{here} has {what} {names[0]}, {there} has {names[1]}"
        else:
            for mine, other_site in zip(self.sites, other.sites, strict=True):
                if mine.gauge != other_site.gauge:
                    raise ArtifactError(
                        f"{here} has {mine.name} in gauge {mine.gauge}, {there} in "
                        f"{other_site.gauge}: the columns differ; make both with one --gauge"
                    )
            return
        raise ArtifactError(f"{found}: they come from different adapters; use a matching pair")

    def _is_of_another(self, other: "SiteLayout") -> bool:
        """Return whether both name a file, or both a training, and not the same one."""
        if not self.adapter or not other.adapter or self.adapter == other.adapter:
            return False
        return self.adapter.startswith(TRAINING) == other.adapter.startswith(TRAINING)

    def _columns(self) -> list[tuple[str, int, str, int]]:
        return [(site.adapter, site.layer, site.projection, site.rank) for site in self.sites]

    def _summary(self) -> str:
        names = ", ".join(dict.fromkeys(site.adapter for site in self.sites if site.adapter))
        of = f" of the adapters {names}" if names else ""
        return f"{self.initials} of layers {self.sites[0].layer}..{self.sites[-1].layer}{of}"

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {
            "adapter": self.adapter,
            "sites": [
                {
                    "layer": site.layer,
                    "projection": site.projection,
                    "rank": site.rank,
                    "module": site.module,
                    "scale": site.scale,
                    "b_norms": list(site.b_norms),
                    # written only if they are not the default, so that older versions read the rest
                    **({"variant": site.lora_kind} if site.lora_kind != "lora" else {}),
                    **({"gauge": site.gauge} if site.gauge != "raw" else {}),
                    **({"adapter": site.adapter} if site.adapter else {}),
                }
                for site in self.sites
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SiteLayout":
        """Read what `to_json` wrote; raise ArtifactError if it is damaged."""
        try:
            names = {"variant": "lora_kind"}
            fields = [
                {names.get(key, key): value for key, value in site.items()}
                for site in data["sites"]
            ]
            sites = [Site(**{**site, "b_norms": tuple(site["b_norms"])}) for site in fields]
            if not all(type(site.rank) is int and type(site.layer) is int for site in sites):
                raise TypeError("a rank or a layer is not a whole number")
            if not all(isinstance(site.adapter, str) for site in sites):
                raise TypeError("the name of an adapter is not text")
            if not isinstance(data["adapter"], str | None):
                raise TypeError("the adapter's digest is not text")
            return cls(tuple(sites), data["adapter"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the site layout is damaged ({error}); make the file again"
            ) from error


def name_modules(paths: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return the layer and projection of every module path; no two paths get the same pair.

    A projection is named by the last parts of its path, as few as make the names differ within
    every layer. If the whole path below the layer is not enough (two towers in one model), the name
    is the full path. A path outside the layers is its own name, in layer -1.
    """
    groups: dict[str, list[tuple[str, int, list[str]]]] = {}
    for path in sorted(set(paths)):
        layer, below = _below_layer(path)
        groups.setdefault(below[-1], []).append((path, layer, below))
    named: dict[str, tuple[int, str]] = {}
    for group in groups.values():
        inside = [(layer, below) for _, layer, below in group if layer >= 0]
        for length in range(1, max((len(below) for _, below in inside), default=0) + 1):
            tails = Counter((layer, tuple(below[-length:])) for layer, below in inside)
            if max(tails.values()) == 1 and not any(tail[0].isdigit() for _, tail in tails):
                break
        else:
            length = 0
        for path, layer, below in group:
            tail = ".".join(below[-length:]) if length and layer >= 0 else path
            named[path] = (layer, tail)
    return named


def _below_layer(path: str) -> tuple[int, list[str]]:
    """Split a module path at its layer number, the first one in it."""
    found = re.search(r"(?:^|\.)(\d+)\.", path)
    if not found:
        return -1, path.split(".")
    return int(found.group(1)), path[found.end() :].split(".")


def join_initials(adapter_types: Sequence[str]) -> str:
    """Return the initials of projections as in published file names: `g-u-d-q-k-v-o`.

    A module called `q` keeps its name, and then `q_proj` does too.
    """
    return "-".join(
        name if _INITIALS.get(name) in adapter_types else _INITIALS.get(name, name)
        for name in adapter_types
    )


def parse_adapter_types(names: Sequence[str], available: Iterable[str] = ()) -> tuple[str, ...]:
    """Return projections in column order from what a user wrote.

    `available` are the projections of the adapter, whose names come first: `gate` is a module of
    that name if there is one, else `gate_proj`. Otherwise accepts `gate_proj`, `gate`, `g`, lists
    joined by `-` or commas, and the groups `mlp`, `attention` and `all`, which is all that are
    available. Any other name is kept, because adapters of other architectures have other
    projections (`c_attn`, `mlp.c_proj`); `SiteLayout.select` refuses those that do not exist.
    """
    available = tuple(available)
    groups = {**_GROUPS, "all": available or PROJECTIONS}
    of_initial = {initial: name for name, initial in _INITIALS.items()}
    chosen: list[str] = []
    for word in _words(names, available):
        if word in available:
            chosen.append(word)
        elif word in groups:
            chosen.extend(groups[word])
        elif word in of_initial:
            chosen.append(of_initial[word])
        elif f"{word}_proj" in PROJECTIONS:
            chosen.append(f"{word}_proj")
        elif word:
            chosen.append(word)
    return in_column_order(chosen)


def in_column_order(projections: Iterable[str]) -> tuple[str, ...]:
    """Return different projections in the order that their columns have within a layer."""
    found = set(projections)
    known = [name for name in PROJECTIONS if name in found]
    return tuple(known + sorted(found - set(PROJECTIONS)))


def _words(names: Sequence[str], available: Sequence[str]) -> list[str]:
    """Split at commas and `-` what is not the name of a projection itself."""
    return [
        piece.strip()
        for name in names
        for piece in ([name] if name in available else re.split("[,-]", name))
    ]
