"""The maths of every algorithm, as pure functions: tensors in, tensors out.

No config, clock, logger, device choice or `torch.distributed` in here. Shapes, throughout the package: `B` samples
(trajectories), `T` response tokens (padded), `K` scores of one sample, `P` prompts (groups). `mask_BT` is 1.0 on tokens
that count; whatever stands elsewhere, NaN included, changes nothing. All maths is float32. A log-ratio is clamped to
±20 before it is exponentiated.

    advantages    rewards -> advantages            losses       log-probs, advantages -> a loss for each token
    aggregation   losses -> one number             corrections  what to do about off-policy tokens
    kl, shaping   penalties and bonuses            value        the critic
    reward_model, preference                       pairs of responses
    declarations  what streams, what goes with what: imports without torch
    registry      names -> functions

Importing this package imports nothing else, so that a recipe can be checked without torch.
"""
