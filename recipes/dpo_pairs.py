"""DPO on pairs made by the same verifiable rewards, with trl's DPOTrainer, whole on a laptop: no GPU, no download.

    python dpo_pairs.py
    python dpo_pairs.py --prompts 2000 --rounds 2
    python dpo_pairs.py --beta 0.3 --learning-rate 5e-5

A model of half a million parameters is made and sees demonstrations of which most are wrong. Then, each round: sample
completions, score them in the same reward workers that a run uses, pair a right one with a wrong one of the same
prompt, and train on the pairs. DPO samples nothing while it trains, so that the pairs are stale after their round.
Seed 0: words sorted go from 7 % to 84 % (held out, greedy) with 615 pairs; further rounds made it no better.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from llm_pg import RLOOConfig
from llm_pg.model.loading import load_model, load_tokenizer
from llm_pg.rewards import Scorer
from llm_pg.run.before.warm_start import warm_start
from reward_fns.sort_letters import prompts

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
HELD_OUT = 256


@torch.no_grad()
def sample(model: Any, tokenizer: Any, texts: list[str], *, greedy: bool = False) -> list[str]:
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    # temperature 1, and no top-k: the pairs are then draws from the policy itself
    given = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.eval().generate(**batch, **given, max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def make_pairs(rows: list[dict[str, Any]], texts: list[str], scores: list[float | None], group: int) -> list[dict]:
    """One pair a prompt that has both a right and a wrong completion; what could not be scored is in no pair."""
    pairs = []
    for place, row in enumerate(rows):
        own = range(place * group, (place + 1) * group)
        known = [(score, texts[i]) for i in own if (score := scores[i]) is not None]
        best, worst = max(known, default=None), min(known, default=None)
        if best is not None and worst is not None and best[0] > worst[0]:
            pairs.append({"prompt": row["prompt"], "chosen": best[1], "rejected": worst[1]})
    return pairs


def train_on(pairs: list[dict], model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=args.beta,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1_000_000,
            use_cpu=not torch.cuda.is_available(),
        )
        data = Dataset.from_list(pairs)
        reference = copy.deepcopy(model)
        DPOTrainer(model, reference, args=config, train_dataset=data, processing_class=tokenizer).train()


def main(words: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000, help="prompts a round")
    parser.add_argument("--group", type=int, default=4, help="completions a prompt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warm-start-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    config = RLOOConfig(
        make=MODEL,
        task="sort_letters",
        num_eval_prompts=HELD_OUT,
        warm_start_steps=args.warm_start_steps,
        warm_start_learning_rate=3e-3,
        warm_start_options={"noise": 0.65, "wrong": "backwards"},
        seed=args.seed,
        use_cpu=True,
    )
    logging.getLogger("trl").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, tokenizer, seed=args.seed)
    rows = prompts(args.seed, config.data.num_train_prompts + HELD_OUT)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    warm_start(model, tokenizer, config, {row["prompt"] for row in held_out})
    with Scorer(["sort_letters"]) as scorer:

        def score(asked: list[dict[str, Any]], texts: list[str]) -> list[float | None]:
            return scorer.grade([row["prompt"] for row in asked], texts, [[0]] * len(texts), asked).reward

        def pass_rate() -> float:
            texts = sample(model, tokenizer, [row["prompt"] for row in held_out], greedy=True)
            return sum(value == 1.0 for value in score(held_out, texts)) / len(held_out)

        rates = [pass_rate()]
        print(f"after the warm start: {rates[0]:.1%} of held-out words sorted")
        for number in range(args.rounds):
            asked = train[number * args.prompts : (number + 1) * args.prompts]
            each = [row for row in asked for _ in range(args.group)]
            texts = sample(model, tokenizer, [row["prompt"] for row in each])
            pairs = make_pairs(asked, texts, score(each, texts), args.group)
            if not pairs:
                raise SystemExit("No prompt has both a right and a wrong completion: warm up longer, or sample more.")
            train_on(pairs, model, tokenizer, args)
            rates.append(pass_rate())
            print(f"round {number + 1}: {len(pairs)} pairs of {len(asked)} prompts, {rates[-1]:.1%} sorted")
    return rates


if __name__ == "__main__":
    main()
