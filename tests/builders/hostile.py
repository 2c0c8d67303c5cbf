"""Text that would run, hide, or turn its surroundings, if a page took it for more than text."""

from dataclasses import replace

from builders.indexes import synthetic
from lorascope.features.index import FeatureIndex
from lorascope.sites import SiteLayout
from lorascope.texts.tokens import pack_tokens

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "</SCRIPT\t><img src=x onerror=window.hacked=1>",
    "<img src='//127.0.0.1/x' onerror=window.hacked=1>",
    "<svg/onload=window.hacked=1>",
    "<!--<script>",
    "-->",
    "]]>",
    "<![CDATA[",
    "<base href='//127.0.0.1/'><meta http-equiv=refresh content='0;url=//127.0.0.1/'>",
    "<style>*{display:none}</style>",
    "javascript:window.hacked=1",
    "&lt;b&amp;&#60;&NewLine;",
    "{{script}}{{core}}",
    "${window.hacked=1}`'\"\\",
    "__proto__",
    "constructor",
    "a\u2028b\u2029c",
    "\u202egnp.exe\u202c\u2066x",
    "\u200f\u200e",
    "\ufeff\u00ad",
    "x\x00y\x00",
    "\x1b[31m\x07\r",
    "\ud83d lone \udc00",
    "e\u0301\u0302\u0303\u0304" * 9,
]
RAW = [*(text.encode(errors="surrogatepass") for text in HOSTILE), b"\xff\xfe", b"\xf0\x9f"]


def hostile_index(n_features: int = 70) -> FeatureIndex:
    """An index with every array, in which all tokens and names are hostile."""
    index = synthetic(n_features, 4, 5, n_texts=4, n_rollouts=20, n_layers=2, dead=0.1)
    raw = [RAW[i % len(RAW)] for i in range(len(index.token_id))]
    offset, data = pack_tokens(raw)
    names = iter(HOSTILE * 20)
    content = {
        key: next(names) if isinstance(value, str) else value
        for key, value in index.content.items()
    }
    content["roles"] = HOSTILE[: len(content["roles"])]
    layout = index.manifest.layout
    assert layout is not None
    sites = [replace(site, module=next(names), projection=next(names)) for site in layout.sites]
    manifest = replace(
        index.manifest,
        version=HOSTILE[0],
        content=content,
        layout=SiteLayout.from_sites(sites, HOSTILE[1]),
        parents=dict.fromkeys(index.manifest.parents, HOSTILE[0]),
        settings={**index.manifest.settings, HOSTILE[3]: HOSTILE[4]},
    )
    arrays = {**index.arrays, "token_offset": offset, "token_data": data}
    return replace(index, manifest=manifest, arrays=arrays)
