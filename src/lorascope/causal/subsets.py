"""Choose parts of the adapter whose rows are rebuilt alone, while the others keep theirs.

Sites may make up for each other's errors, so that a part of them alone loses more than all of them.
`worst_subset` searches for the subset of sites whose reconstruction has the largest KL:

1. Begin with all sites. `m` is 1 for a site that is rebuilt, 0 for one that keeps its row.
2. Run `x + m·(x̂ − x)` and take the gradient of the KL by `m`. To first order, to flip a site
   changes the KL by `(1 − 2m)·gradient`.
3. Flip the sites that promise most, at first half of all. If the KL has risen, go on from there;
   else flip half as many.
"""

import numpy as np
import numpy.typing as npt
import torch

from lorascope.causal.effects import select_measured
from lorascope.causal.gradients import input_gradients, no_weight_gradients
from lorascope.causal.held_out import HeldOut
from lorascope.causal.splice import SplicedBatch
from lorascope.sae.model import SAE
from lorascope.sites import SiteLayout
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import has_role

_COPIES = 4  # times the memory of a plain run that a gradient takes


def column_groups(layout: SiteLayout) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """Return a mask of the columns, `(d_in,)`, of each layer and of each projection."""
    ranks = [site.rank for site in layout.sites]
    layer = np.repeat([site.layer for site in layout.sites], ranks)
    kind = np.repeat([site.projection for site in layout.sites], ranks)
    return {
        **{("layers", str(n)): layer == n for n in np.unique(layer)},
        **{("projections", n): kind == n for n in layout.adapter_types},
    }


def sites_in(layout: SiteLayout, mask: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the names of the sites whose columns are in a mask, `(d_in,)`."""
    last = np.cumsum([site.rank for site in layout.sites]) - 1
    return tuple(site.name for site, is_in in zip(layout.sites, mask[last], strict=True) if is_in)


def subsets(
    held_out: HeldOut, sae: SAE, n: int, seed: int
) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """Return a mask of the columns, `(d_in,)`, of `n` random subsets of the sites and of the worst.

    A subset has each site with probability 1/2. Nothing is searched for or returned for n = 0.
    """
    if not n:
        return {}
    ranks = [site.rank for site in sae.layout.sites]
    drawn = np.random.default_rng([seed, len(ranks)]).random((n, len(ranks))) < 0.5
    drawn[~drawn.any(1)] = True
    masks = {("subsets", str(i)): mask for i, mask in enumerate(drawn)}
    masks["subsets", "worst"] = worst_subset(held_out, sae, n)
    return {key: np.repeat(mask, ranks) for key, mask in masks.items()}


def worst_subset(held_out: HeldOut, sae: SAE, n_steps: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the sites whose reconstruction alone has the largest KL that was found.

    The KL is that of generated tokens, or of all if no token is generated.
    """
    _, columns = held_out.subject.layout.select(sae.layout.adapter_types)
    ranks = [site.rank for site in sae.layout.sites]
    n_sites = len(ranks)
    size = max(1, n_sites // 2)
    mask = np.ones(n_sites, bool)
    site = torch.repeat_interleave(torch.arange(n_sites), torch.tensor(ranks))
    of_all = not has_role(held_out.store.roles, ("think", "answer")).any()
    with no_weight_gradients(held_out.subject), RowEditor(held_out.subject) as editor:

        def measured(mask: npt.NDArray[np.bool_]) -> tuple[float, npt.NDArray[np.float64]]:
            total, gradient = 0.0, np.zeros(n_sites)
            for batch in held_out.batches(_COPIES):
                with torch.no_grad():
                    spliced = SplicedBatch(editor, batch, columns)
                    rebuilt = sae.decode(sae.encode(spliced.x.cpu())).to(spliced.x.device)
                m = torch.from_numpy(mask).float().requires_grad_()
                part = m[site].to(rebuilt.device)
                counts = torch.from_numpy(held_out.is_generated(batch.measured) | of_all)
                logits, _ = spliced.run(spliced.x + part * (rebuilt - spliced.x))
                counts = counts.to(rebuilt.device)
                log_q = select_measured(logits, batch.mask)[counts].float().log_softmax(-1)
                log_p = spliced.log_p[counts]
                kl = (log_p.exp() * (log_p - log_q).nan_to_num(0.0)).sum()
                gradient += input_gradients(held_out.subject, kl, [m])[0].double().numpy()
                total += float(kl.detach())
            return total, gradient

        kl, gradient = measured(mask)
        for _ in range(n_steps - 1):
            gain = np.where(mask, -gradient, gradient)
            flips = [i for i in np.argsort(-gain, kind="stable")[:size] if gain[i] > 0]
            trial = mask.copy()
            trial[flips] = ~trial[flips]
            if not flips or not trial.any():
                break
            trial_kl, trial_gradient = measured(trial)
            if trial_kl > kl:
                mask, kl, gradient = trial, trial_kl, trial_gradient
            elif len(flips) == 1:
                break
            else:
                size = len(flips) // 2
    return mask
