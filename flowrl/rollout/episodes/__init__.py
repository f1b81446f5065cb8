"""An episode turns one prompt into one trajectory: `async (context) -> Trajectory`. Three are here: a single turn,
turns with tools, turns against an environment. Yours: `rollout.episode` in the recipe, by dotted path.

An episode may call the engine several times. Its trajectory says with `mask` which tokens the model wrote, and passes
on the engine's log-probs and versions for those; `Transcript` keeps these books.
"""

from flowrl.rollout.episodes.context import Episode, EpisodeContext
from flowrl.rollout.episodes.interaction import environment
from flowrl.rollout.episodes.single import single_turn
from flowrl.rollout.episodes.tool_use import multi_turn
from flowrl.rollout.episodes.trajectory import Trajectory, Transcript
from flowrl.rollout.failure import EpisodeFailed, Failure

__all__ = [
    "Episode",
    "EpisodeContext",
    "EpisodeFailed",
    "Failure",
    "Trajectory",
    "Transcript",
    "environment",
    "multi_turn",
    "single_turn",
]
