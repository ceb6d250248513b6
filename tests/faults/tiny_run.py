"""One small run in a process of its own, to be killed or started on two ranks: `python tiny_run.py '<json>'`.

Keys: out, name, algorithm, changes (settings), resume, override, lora, fault and at (see `inject`), reward,
sizes of the model, unreachable_seconds: of a machine, single_messages: one for each gradient, inside_folder: `out` is
the working directory, count_collectives, and inside: what is sampled ahead is sampled in a thread of this process, by
the engine that vllm has, which is ready at once.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import transformers.trainer  # noqa: F401  what every run asks for its optimiser: a forked process finds it imported

from llm_pg import PolicyGradientTrainer
from llm_pg.config.load import check_values
from llm_pg.config.schema import ModelConfig
from llm_pg.distributed import data_parallel, network
from llm_pg.model.loading import character_tokenizer, load_model
from llm_pg.rollout.ahead.engines import Frozen
from llm_pg.run import sources
from llm_pg.run.saving import checkpoint_files
from llm_pg.sampling.vllm import client
from tests.distributed.counting import print_collectives
from tests.faults.failing_disk import on_a_small_disk
from tests.seams import Steps

LIGHT = Path(__file__).with_name("light_rewards.py")
SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
SMALL = {
    "max_steps": 6,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_eval_prompts": 4,
    "eval_num_samples": 0,
    "eval_on_start": False,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "reward_workers": 1,
}
ROWS = [{"prompt": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(4) for b in range(5)]
NUM_TRAINED = 16


def inject(trainer: Any, fault: str, at: int) -> None:
    """Break step `at`."""
    loss, number = trainer.algorithm.loss, trainer.context.ranks.number

    def before(step: int) -> None:
        if step == at and fault in ("sigterm", "sigint"):
            os.kill(os.getpid(), signal.SIGTERM if fault == "sigterm" else signal.SIGINT)
        if step == at and fault == "kill wandb":
            kill_wandb()
        if fault == "slow steps":
            time.sleep(0.5)
        if step == at + 1 and fault == "kill the second rank's sampler" and number == 1:
            os.kill(trainer.run.source.ahead.engine.child.process.pid, signal.SIGKILL)
        if step == at and fault == "the first rank cannot save the model" and number == 0:
            trainer.model.save_pretrained = cannot_save
        if step == at and fault == "the first rank cannot write a checkpoint" and number == 0:
            checkpoint_files.save = cannot_save
        if step == at + 1 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)

    def faulty_loss(*given: Any, **named: Any) -> Any:
        value, stats = loss(*given, **named)
        step = trainer.run.step
        if step == at and fault == "raise":
            raise RuntimeError("injected: the loss is broken")
        if step == at and fault == "twice":  # two signals while the step lasts
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        one_rank = fault == "nan on the second rank once" and number == 1 and step == at
        if one_rank or (fault == "nan" and step >= at):
            value = value * float("nan")
            stats["policy_loss"] = value.detach()
        return value, stats

    trainer.add_callback(Steps(before=before))
    trainer.algorithm.loss = faulty_loss


def cannot_save(*_: Any, **__: Any) -> None:
    raise ValueError("injected: the model cannot be written")


def kill_wandb() -> None:
    """End wandb's service process as a kernel out of memory would."""
    import psutil

    services, end = [], time.monotonic() + 30
    while not services and time.monotonic() < end:  # it is started beside the first steps
        time.sleep(0.05)
        children = psutil.Process().children(recursive=True)
        services = [child for child in children if "wandb" in " ".join(child.cmdline())]
    assert services, "wandb runs no service process"
    for service in services:
        service.kill()


def sample_inside(trainer: Any) -> None:
    """Sampling ahead without a process of its own."""
    train = trainer.train

    def frozen(sampler: Any, *_: Any, max_staleness: int, **__: Any) -> Frozen:
        return Frozen(sampler, max_staleness + 1)

    def trains(*given: Any, **named: Any) -> Any:
        with mock.patch.object(sources, "make_engine", frozen):
            return train(*given, **named)

    trainer.train = trains


@contextlib.contextmanager
def ahead_by_nothing(trainer: Any) -> Iterator[None]:
    """Inside the block the trainer uses the machinery of sampling ahead, without a lag."""
    with contextlib.ExitStack() as stack:

        def begin(step: int) -> None:
            if step == 1:
                run = trainer.run
                ahead = sources.make_ahead(run.context, trainer.policy, trainer.collector, trainer.prompts)
                run.source.source = stack.enter_context(ahead)

        trainer.add_callback(Steps(before=begin))
        yield


def make(options: dict[str, Any], **more: Any) -> PolicyGradientTrainer:
    algorithm = options.get("algorithm", "grpo")
    values = {**SMALL, "name": algorithm, "output_dir": options["out"], "run_name": options["name"]}
    config = check_values({**values, **options.get("changes", {})})
    tokenizer = character_tokenizer()
    peft_config = None
    if options.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    model = load_model(ModelConfig(make=options.get("sizes", SIZES)), tokenizer, seed=0)
    if options.get("fault") == "another weight on the second rank" and os.environ.get("RANK") == "1":
        model.model.layers[0].mlp.up_proj.weight.data[1, 2] += 1e-6
    made = PolicyGradientTrainer(
        model=model,
        reward_funcs=options.get("reward", f"{LIGHT}:digits"),
        args=config,
        train_dataset=options.get("rows", ROWS),
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )
    if options.get("inside"):
        sample_inside(made)
    return made


def write_slowly(trainer: Any) -> None:
    """The first rank takes its time with checkpoints and the summary, and prints when each was written."""

    def slowly(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*given: Any, **named: Any) -> Any:
            time.sleep(2)
            done = write(*given, **named)
            print(f"written at {time.monotonic()}", flush=True)
            return done

        return written

    if trainer.context.ranks.is_main:
        trainer.context.folder.write_summary = slowly(trainer.context.folder.write_summary)
        checkpoint_files.save = slowly(checkpoint_files.save)


def main(given: dict[str, Any]) -> None:
    if given.get("count_collectives"):
        print_collectives()
    if "unreachable_seconds" in given:
        network.UNREACHABLE_S = client.UNREACHABLE_S = given["unreachable_seconds"]
    if given.get("single_messages"):
        data_parallel.buckets = lambda parameters: [[p] for p in parameters]
    made = make(given)
    if "fault" in given:
        inject(made, given["fault"], given["at"])
    if given.get("slow_writes"):
        write_slowly(made)
    try:
        made.train(resume=given.get("resume", False), override=given.get("override", False))
    finally:
        if given.get("slow_writes"):
            print(f"left at {time.monotonic()}", flush=True)


def logged(given: dict[str, Any], env: dict[str, str], log: str) -> None:
    """`main` with this environment, everything that it prints in the file `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    if given.get("inside_folder"):
        os.chdir(given["out"])
    if "kilobytes" in given:
        on_a_small_disk(given, main)
    else:
        main(given)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
