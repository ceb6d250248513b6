"""From prompts to scored rollouts: one batch, episodes of several turns, refills, and which prompts come next."""
