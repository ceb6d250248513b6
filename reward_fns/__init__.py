"""Reward functions that a program can verify, and generators of tasks for them. No torch.

One file is one family. A reward function is pure and has the plain form

    f(completion: str, <the columns it needs>, **row) -> float | dict[str, float]

and carries, as `f.reward_info`, its range and an honest floor: the highest score that a completion without any work
in it (junk, nothing, an echo of the prompt, every answer at once, tags only) can earn. Any parameter can be fed from a
dataset column of that name, or be fixed for a run: `{"function": "format_regex", "pattern": "..."}`.

A task module also has `prompts(seed, n, **options)`, `demonstrations(seed, n, **options)` and `REWARD`, the name of
the reward function that scores it. `reward_fns.registry` lists both.
"""
