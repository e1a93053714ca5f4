"""What should be seen of the later claims of claims.py, written before their runs.

Each is a figure, how it is taken from a seed's logs (`of` is claims.Logs), which seeds count, and
the least and the largest that was predicted. PRDP is at K = 4 in all of them but E2, H and I.
"""

import itertools
import math
from collections.abc import Callable, Iterable

INF = math.inf
OBJECTIVE = "weighted sum - kl_weight * kl"
HELD = ("PRDP, JPEG, KL 300", "PRDP, JPEG, KL 1000")
LONG = "DDPO, 200 epochs, 1e-4"
FREE = ("GRPO, 400 epochs", "RLOO, 400 epochs")


def least_change(fifths: Iterable[float]) -> float:
    """From one to the next."""
    return min(later - earlier for earlier, later in itertools.pairwise(fifths))


PREDICTIONS: list[tuple[str, str, Callable, str, float, float]] = [
    ("A4", "reward of PRDP minus that of DDPO with as many images",
     lambda of: of.lead("DDPO"), "every seed", 0, INF),
    ("A4", "reward of PRDP minus that of DDPO with as much time",
     lambda of: of.lead("DDPO, 40 epochs, 4e-4"), "mean", -INF, 0),
    ("A4", "reward of PRDP with 40 epochs minus that of DDPO with 40 at PRDP's rate",
     lambda of: of.lead("DDPO, 40 epochs, 1e-4", "PRDP, K = 4, 40 epochs, 1e-4"), "mean", 0, INF),
    ("A4", "the same with half the rate for PRDP",
     lambda of: of.lead("DDPO, 40 epochs, 1e-4", "PRDP, K = 4, 40 epochs, 5e-5"),
     "mean", 0, INF),
    ("A4", "kl of PRDP then", lambda of: of.curve("PRDP, K = 4, 40 epochs, 5e-5", "kl")[-1],
     "mean", 0.03, 0.06),
    ("A4", "reward of PRDP minus that of GRPO at the same K and rate",
     lambda of: of.lead("GRPO, K = 4"), "every seed", 0, INF),
    ("B4", "reward of PRDP", lambda of: of.curve("PRDP, K = 4, 1e-4")[-1], "mean", 0.672, 0.678),
    ("B4", "reward of PRDP minus that of DDPO with as many images",
     lambda of: of.lead("DDPO", "PRDP, K = 4, 1e-4"), "every seed", 0, INF),
    ("B4", "reward of PRDP minus that of DDPO with as much time",
     lambda of: of.lead("DDPO, 100 epochs, 2e-4", "PRDP, K = 4, 1e-4"), "mean", -INF, 0),
    ("B4", "the same at PRDP's rate",
     lambda of: of.lead("DDPO, 100 epochs, 1e-4", "PRDP, K = 4, 1e-4"), "mean", -INF, 0),
    ("B4", "reward of PRDP minus that of GRPO at the same K and rate",
     lambda of: of.lead("GRPO, K = 4", "PRDP, K = 4, 1e-4"), "every seed", 0, INF),
    ("B4", "reward of PRDP at half its rate minus that at its rate",
     lambda of: of.lead("PRDP, K = 4, 1e-4", "PRDP, K = 4, 5e-5"), "mean", -0.006, 0.004),
    ("B4", "kl of PRDP then", lambda of: of.curve("PRDP, K = 4, 5e-5", "kl")[-1],
     "every seed", 0.03, 0.05),
    ("B4", "reward of PRDP then minus that of DDPO with as much time, at this rate, too",
     lambda of: of.lead("DDPO, 100 epochs, 5e-5", "PRDP, K = 4, 5e-5"), "mean", 0, INF),
    ("B4", "kl of DDPO then", lambda of: of.curve("DDPO, 100 epochs, 5e-5", "kl")[-1],
     "mean", 0.04, 0.08),
    ("C", "epochs by which the norm clip alone delays PRDP's collapse",
     lambda of: of.collapse("PRDP, K = 4, norm clip alone") -
     of.collapse("PRDP, K = 4, no clipping"), "every seed", 0, INF),
    ("E2", "largest kl at weights of 300 and more",
     lambda of: max(of.ends("kl", *HELD)), "mean", 0, 0.003),
    ("E2", "smallest share of right animals there",
     lambda of: min(of.ends("animal", *HELD)), "mean", 0.55, 1),
    ("H", "kl of RLOO minus that of PRDP",
     lambda of: of.lead("PRDP, 80 epochs", "RLOO, 80 epochs", "kl"), "every seed", 0.1, INF),
    ("H", "reward of RLOO minus that of PRDP",
     lambda of: of.lead("PRDP, 80 epochs", "RLOO, 80 epochs"), "mean", -0.01, 0.01),
    ("I", "kl of RLOO in the last fifth of 160 epochs",
     lambda of: of.curve("RLOO, 160 epochs", "kl")[-1], "mean", 0.2, INF),
    ("I", "its least change from fifth to fifth",
     lambda of: least_change(of.curve("RLOO, 160 epochs", "kl")), "mean", 0, INF),
    ("I", "kl of DDPO at 1e-4 in the last fifth of 200 epochs",
     lambda of: of.curve(LONG, "kl")[-1], "mean", 0.2, 0.45),
    ("I", "its share of samples with everything right, last fifth minus third",
     lambda of: of.curve(LONG, "reward/all_right")[4] - of.curve(LONG, "reward/all_right")[2],
     "mean", -INF, 0),
    ("I", "share of unseen sentences with everything right then, minus the base's",
     lambda of: of.gain(LONG, "all_right"), "mean", 0, INF),
    ("L", "reward of DDPO", lambda of: of.curve("DDPO, 400 epochs")[-1], "every seed", 0.69, INF),
    ("L", "smaller kl of GRPO and RLOO",
     lambda of: min(of.ends("kl", *FREE)), "every seed", 0.5, INF),
    ("L", "larger fall of the reward of GRPO and RLOO",
     lambda of: max(of.fall(method) for method in FREE), "one seed", 0.02, INF),
    ("L", "smallest kl of PRDP in the last three fifths",
     lambda of: min(of.curve("PRDP, K = 4, 400 epochs", "kl")[2:]), "every seed", 0.09, 0.13),
    ("L", "largest kl of PRDP there", lambda of: max(of.curve("PRDP, K = 4, 400 epochs", "kl")[2:]),
     "every seed", 0.09, 0.13),
    ("M", "share of its gain that DDPO keeps at level 10, statistics of the batch",
     lambda of: of.left("DDPO, batch statistics", 10), "mean", -INF, 0.2),
    ("M", "the same with statistics of each prompt",
     lambda of: of.left("DDPO", 10), "mean", 0.5, INF),
    ("M-large", "share of its gain that DDPO keeps at level 1",
     lambda of: of.left("DDPO", 1), "mean", 0.75, 1.05),
    ("M-large", "the same at level 3", lambda of: of.left("DDPO", 3), "mean", 0.25, 0.55),
    ("M-large", "the same at level 10", lambda of: of.left("DDPO", 10), "mean", -0.1, 0.2),
    ("M-large", "gain of PRDP at level 10 minus that at level 0",
     lambda of: of.gain("PRDP, K = 4, level 10") - of.gain("PRDP, K = 4"), "mean", -0.01, 0.01),
    ("R", "explained variance of online training",
     lambda of: of.curve("PRDP, K = 4, KL 300", "explained_variance")[-1], "mean", 0.3, 1),
    ("R", "least change of the objective from fifth to fifth",
     lambda of: least_change(reward - 300 * kl for reward, kl in zip(
         of.curve("PRDP, K = 4, KL 300"), of.curve("PRDP, K = 4, KL 300", "kl"), strict=True)),
     "every seed", 0, INF),
    ("R", "explained variance of offline training",
     lambda of: of.curve("PRDP, K = 4, KL 300, offline", "explained_variance")[-1],
     "mean", -INF, 0.3),
    ("P", "share of right animals", lambda of: of.ends("animal", "PRDP, K = 4")[0],
     "mean", 0.96, 1),
    ("P", "share of right animals minus that of the base at its best guidance",
     lambda of: of.above_base("animal", "PRDP, K = 4"), "mean", 0, INF),
    ("P", "objective minus that of the base",
     lambda of: of.gain("PRDP, K = 4", OBJECTIVE), "every seed", 0, INF),
    ("P-large", "share of unseen sentences with everything right, minus that of the base at its "
     "best guidance: the first preset, at 1e-4",
     lambda of: of.above_base("all_right", "PRDP, K = 4, 1e-4"), "mean", 0.05, INF),
    ("P-large", "the same at 5e-5, sampled at guidance 3",
     lambda of: of.above_base("all_right", "PRDP, K = 4, 5e-5", "-guidance-3"),
     "mean", 0.05, INF),
    ("P-large", "the same after 60 epochs",
     lambda of: of.above_base("all_right", "PRDP, K = 4, 60 epochs, 5e-5", "-guidance-3"),
     "mean", 0.05, INF),
    ("P-large", "objective then minus that after 40 epochs",
     lambda of: of.gain("PRDP, K = 4, 60 epochs, 5e-5", OBJECTIVE) -
     of.gain("PRDP, K = 4, 5e-5", OBJECTIVE), "mean", -0.01, 0.01),
    ("P-large", "objective minus that of the base at 5e-5",
     lambda of: of.gain("PRDP, K = 4, 5e-5", OBJECTIVE), "every seed", 0.05, INF),
]
