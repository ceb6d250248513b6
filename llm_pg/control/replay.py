"""The final policy at its most probable actions: a text of one episode, and a GIF where one can be drawn."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from .mdp import draw_grid
from .record import ControlRun
from .tabular import TabularEnv

MAX_FRAMES = 250
SEED = 12_345


def replay(run: ControlRun, folder: Path) -> list[Path]:
    """Play one episode; write `replay.txt`, and `replay.gif` where gymnasium can render. Returns what was written."""
    settings = run.settings
    metadata = gymnasium.spec(settings.env)
    # Frames are drawn in memory; without this, SDL looks for a display and complains where there is none.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    mode = "rgb_array" if "rgb_array" in _render_modes(settings.env, settings.env_options) else None
    try:
        env = gymnasium.make(metadata, render_mode=mode, disable_env_checker=True, **settings.env_options)
        frames, lines, return_ = _play(run, env)
    except gymnasium.error.DependencyNotInstalled as error:
        env = gymnasium.make(metadata, disable_env_checker=True, **settings.env_options)
        frames, lines, return_ = _play(run, env)
        lines.append(f"(no picture: {error})")
    with contextlib.closing(env):
        folder.mkdir(parents=True, exist_ok=True)
        head = f"{settings.spec.name} on {settings.env}: one episode at the most probable actions, return {return_:.2f}"
        text = folder / "replay.txt"
        text.write_text("\n".join([head, "", *lines]) + "\n", encoding="utf-8")
        written = [text]
        if frames:
            written.append(_gif(frames, folder / "replay.gif", env.metadata.get("render_fps", 30)))
    return written


def _render_modes(env_id: str, options: dict[str, Any]) -> list[str]:
    env = gymnasium.make(env_id, disable_env_checker=True, **options)
    modes = list(env.metadata.get("render_modes", []))
    env.close()
    return modes


def _play(run: ControlRun, env: gymnasium.Env) -> tuple[list[np.ndarray], list[str], float]:
    assert run.policy is not None
    assert run.scaler is not None
    inner = env.unwrapped
    grid = inner.mdp if isinstance(inner, TabularEnv) and inner.mdp.shape is not None else None
    lines: list[str] = []
    frames: list[np.ndarray] = []
    if grid is not None:
        features = np.eye(grid.num_states, dtype=np.float32)
        lines += ["the policy", draw_grid(grid, action_S=run.policy.act(features, 0.0)[1]), "", "the walk"]
    observation, _ = env.reset(seed=SEED)
    total, step, over = 0.0, 0, False
    while not over and step < (run.interface.horizon or 1_000):
        if env.render_mode == "rgb_array" and len(frames) < MAX_FRAMES:
            frames.append(np.asarray(env.render()))
        _, action = run.policy.act(run.scaler(np.asarray(observation)[None]), 0.0)
        seen = observation
        observation, reward, terminated, truncated, _ = env.step(action[0])
        total, step, over = total + float(reward), step + 1, terminated or truncated
        if grid is not None:
            lines += [draw_grid(grid, int(observation)), f"step {step}, reward {float(reward):.2f}", ""]
        else:
            lines.append(f"{step:4d}  saw {_numbers(seen)}  did {_numbers(action[0])}  reward {float(reward):8.3f}")
    return frames, lines, total


def _numbers(x: Any) -> str:
    return " ".join(f"{float(v):7.3f}" if isinstance(v, np.floating) else str(int(v)) for v in np.atleast_1d(x))


def _gif(frames: list[np.ndarray], path: Path, fps: int) -> Path:
    from PIL import Image

    every = max(round(fps / 25), 1)  # viewers slow down what runs faster than that
    pictures = [Image.fromarray(frame) for frame in frames[::every]]
    half = [
        p.resize((p.width // 2, p.height // 2)).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
        for p in pictures
    ]
    half[0].save(path, save_all=True, append_images=half[1:], duration=int(1000 * every / fps), loop=0)
    return path
