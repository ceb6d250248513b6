"""What happens before the first step.

preflight: everything that needs no torch. fit_to_prompts: end tokens and rotary frequencies of the model. auditing: the
reward functions on right and wrong answers. rehearsal: what the end needs. trial: the longest batch. warm_start: SFT.
"""
