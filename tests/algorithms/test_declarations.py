"""What the algorithms declare, and that it is true of the functions."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from flowrl.algorithms import advantages, declarations, losses, registry
from flowrl.algorithms.declarations import ALGORITHMS, Anchor, Scope, Streaming, check_aggregation, streaming


def test_declarations_import_without_torch() -> None:
    program = "import sys, flowrl.algorithms.declarations; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_every_declared_name_has_its_function() -> None:
    assert registry.LOSSES.keys() == declarations.LOSSES.keys()
    assert registry.ADVANTAGES.keys() == declarations.ADVANTAGES.keys()
    assert all(getattr(losses, name) is function for name, function in registry.LOSSES.items())
    assert all(getattr(advantages, name) is function for name, function in registry.ADVANTAGES.items())


@pytest.mark.parametrize("name", sorted(declarations.ADVANTAGES))
def test_declared_inputs_are_the_arguments(name: str) -> None:
    parameters = inspect.signature(registry.ADVANTAGES[name]).parameters.values()
    required = tuple(parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty)
    assert required == declarations.ADVANTAGES[name].inputs


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_algorithms_are_made_of_declared_parts(name: str) -> None:
    algorithm = ALGORITHMS[name]
    check_aggregation(algorithm.loss, algorithm.aggregation)
    assert (
        algorithm.advantage_settings.keys()
        <= inspect.signature(registry.ADVANTAGES[algorithm.advantage]).parameters.keys()
    )
    assert algorithm.loss_settings.keys() <= inspect.signature(registry.LOSSES[algorithm.loss]).parameters.keys()


@pytest.mark.parametrize("name", [n for n, t in declarations.ADVANTAGES.items() if t.inputs[-1] == "group_B"])
def test_a_group_can_be_scored_alone_unless_declared_otherwise(name: str) -> None:
    """The declaration against the function: does another group in the batch change this one's advantages?"""
    score_B, group_B = torch.tensor([1.0, 0.0, 2.0, 9.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    arguments = {"score_B": score_B, "group_B": group_B, "length_B": torch.tensor([1, 2, 3, 4, 5])}
    inputs = declarations.ADVANTAGES[name].inputs
    whole_B = registry.ADVANTAGES[name](*(arguments[key] for key in inputs))[:3]
    alone_B = registry.ADVANTAGES[name](*(arguments[key][:3] for key in inputs))
    if declarations.ADVANTAGES[name].scope is Scope.GROUP:
        torch.testing.assert_close(whole_B, alone_B)
    else:
        assert not torch.allclose(whole_B, alone_B)
        torch.testing.assert_close(whole_B / whole_B[2], alone_B / alone_B[2])


def test_what_streams() -> None:
    assert streaming("grpo")[0] is Streaming.STREAMS
    assert streaming("grpo", has_terms_without_advantage=True)[0] is Streaming.STREAMS
    assert streaming("lite_ppo")[0] is Streaming.SCALED
    assert streaming("lite_ppo", has_terms_without_advantage=True)[0] is Streaming.WAITS
    for name in ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"):
        assert streaming(name)[0] is Streaming.WAITS
    for reason in ({"has_m2po": True}, {"num_minibatches": 2}, {"num_epochs": 2}):
        assert streaming("grpo", **reason)[0] is Streaming.WAITS
    with pytest.raises(ValueError, match="grop"):
        streaming("grop")


@pytest.mark.parametrize(
    ("loss", "anchor", "has_correction"),
    [
        ("ppo", Anchor.ROLLOUT, True),
        ("decoupled_ppo", Anchor.ROLLOUT, False),
        ("segment_ppo", Anchor.RECOMPUTED, True),
        ("dppo_tv", Anchor.RECOMPUTED, False),
    ],
)
def test_policies_that_do_not_belong_together_are_refused(loss: str, anchor: Anchor, has_correction: bool) -> None:
    with pytest.raises(ValueError, match=r"correction|old log-probs"):
        declarations.check_policies(loss, anchor, has_correction)


def test_policies_that_belong_together_pass() -> None:
    declarations.check_policies("ppo", Anchor.ROLLOUT, False)
    declarations.check_policies("ppo", Anchor.RECOMPUTED, True)
    declarations.check_policies("decoupled_ppo", Anchor.RECOMPUTED, False)
    declarations.check_policies("dppo_tv", Anchor.ROLLOUT, False)


def test_a_sequence_loss_forces_its_aggregation() -> None:
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        check_aggregation("gspo", "token-mean")
    check_aggregation("ppo", "token-sum")
