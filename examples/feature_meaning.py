"""Print how well the demo's features match known classes of tokens: F1 on held-out rollouts.

python examples/feature_meaning.py demo-output
"""

import sys
from pathlib import Path

from lorascope import ActivationStore, load_sae
from lorascope.demo import meaning
from lorascope.demo.problems import make_problem

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
store = ActivationStore.open(folder / "activations")
sae = load_sae(folder / "sae", store)
problems = [make_problem("demo", i) for i in range(store.n_rollouts)]
labels = meaning.label_tokens(store, problems)
scores = {
    "SAE, best feature": meaning.score_latents(sae, store, labels),
    "LoRA, best raw column": meaning.score_columns(store, labels),
    "random dictionary": meaning.score_latents(
        meaning.random_dictionary(sae, store, seed=0), store, labels
    ),
}
print(meaning.meaning_table(scores))
