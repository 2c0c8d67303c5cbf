"""What each column of a row means.

A *site* is one adapted module. Its `lora_A` writes `rank` scalars per token, which are `rank`
neighbouring columns of the row. A `SiteLayout` lists the sites in column order: layer-major,
inside a layer gate, up, down, q, k, v, o (then any other name, alphabetically), inside a site by
rank index. The layout travels with every artifact, and two artifacts meet only when theirs agree.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import ArtifactError, ConfigError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
_GROUPS = {"all": PROJECTIONS, "mlp": PROJECTIONS[:3], "attention": PROJECTIONS[3:]}
_INITIALS = {name: name[0] for name in PROJECTIONS}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted module.

    `layer` is -1 where the module's path has no layer number. `scale` is what PEFT multiplies
    `B(A(x))` with. `b_norms[i]` is the Euclidean norm of column i of `B`; 1.0 where unknown.
    """

    layer: int
    projection: str
    rank: int = 1
    module: str = ""
    scale: float = 1.0
    b_norms: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Name the site for people: `3.gate_proj`."""
        return f"{self.layer}.{self.projection}" if self.layer >= 0 else self.module

    @property
    def order(self) -> tuple[int, int, str, str]:
        """Sort key of the column order; sites outside any layer come last."""
        known = self.projection in PROJECTIONS
        place = PROJECTIONS.index(self.projection) if known else len(PROJECTIONS)
        layer = self.layer if self.layer >= 0 else 1 << 30
        return (layer, place, self.projection, self.module)


@dataclass(frozen=True)
class SiteLayout:
    """The sites of a row in column order, and the digest of the adapter that they belong to.

    `adapter` is None for stores of the published scripts, which do not say it; such a store
    meets any other artifact of the same sites.
    """

    sites: tuple[Site, ...]
    adapter: str | None = None

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(self.sites, key=lambda site: site.order):
            raise ValueError("sites must come in column order; use SiteLayout.of")
        for site in self.sites:
            if site.b_norms and len(site.b_norms) != site.rank:
                raise ValueError(f"{site.name}: {len(site.b_norms)} norms for rank {site.rank}")

    @classmethod
    def of(cls, sites: Sequence[Site], adapter: str | None = None) -> "SiteLayout":
        """Make a layout from sites in any order."""
        return cls(tuple(sorted(sites, key=lambda site: site.order)), adapter)

    @cached_property
    def d_in(self) -> int:
        """Number of columns: the sum of the ranks."""
        return sum(site.rank for site in self.sites)

    @cached_property
    def n_layers(self) -> int:
        """Number of layers that hold a site."""
        return len({site.layer for site in self.sites})

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns: the site's name, with `:i` for rank index i where rank > 1."""
        return tuple(
            site.name if site.rank == 1 else f"{site.name}:{i}"
            for site in self.sites
            for i in range(site.rank)
        )

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
        """The projections that occur, in column order."""
        found = {site.projection for site in self.sites}
        known = [name for name in PROJECTIONS if name in found]
        return tuple(known + sorted(found - set(PROJECTIONS)))

    @cached_property
    def initials(self) -> str:
        """The projections' initials joined by `-`, as the published file names carry them."""
        return initials_of(self.adapter_types)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that the layout says."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

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
        elif self.adapter and other.adapter and self.adapter != other.adapter:
            found = f"{here} is of adapter {self.adapter[:12]}, {there} of {other.adapter[:12]}"
        else:
            return
        raise ArtifactError(f"{found}: they come from different adapters; use a matching pair")

    def _columns(self) -> list[tuple[int, str, int]]:
        return [(site.layer, site.projection, site.rank) for site in self.sites]

    def _summary(self) -> str:
        return f"{self.initials} of layers {self.sites[0].layer}..{self.sites[-1].layer}"

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
                }
                for site in self.sites
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SiteLayout":
        """Read what `to_json` wrote. Raises ArtifactError when it is something else."""
        try:
            sites = [Site(**{**site, "b_norms": tuple(site["b_norms"])}) for site in data["sites"]]
            return cls(tuple(sites), data["adapter"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the site layout is damaged ({error}); make the file anew"
            ) from error


def initials_of(adapter_types: Sequence[str]) -> str:
    """Join the initials of projections as published file names do: `g-u-d-q-k-v-o`."""
    return "-".join(_INITIALS.get(name, name) for name in adapter_types)


def parse_adapter_types(names: Sequence[str]) -> tuple[str, ...]:
    """Return projections in column order from names, initials or groups.

    Accepts `gate_proj`, `gate`, `g`, `g-u-d`, comma-separated lists, and the groups `all`, `mlp`
    and `attention`. A name that is none of these is kept: adapters of other architectures have
    other projections, and the layout they must occur in has the last word.
    """
    chosen: list[str] = []
    for part in (piece for name in names for piece in name.split(",") if piece.strip()):
        word = part.strip()
        if word in _GROUPS:
            chosen.extend(_GROUPS[word])
        elif all(initial in _INITIALS.values() for initial in word.split("-")):
            chosen.extend(name for i in word.split("-") for name in PROJECTIONS if name[0] == i)
        elif f"{word}_proj" in PROJECTIONS:
            chosen.append(f"{word}_proj")
        else:
            chosen.append(word)
    known = [name for name in PROJECTIONS if name in chosen]
    return tuple(known + sorted(set(chosen) - set(PROJECTIONS)))
