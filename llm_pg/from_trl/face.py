"""The names of TRL's trainers that scripts read and call. Nothing of a run is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import trainer_pt_utils

from ..config import Config
from .hub import upload, write_card


class TrlFace:
    """What a script written for TRL reads of a trainer, by TRL's names.

    It reads the trainer's own objects: `config`, `context`, `model`, `tokenizer`, `policy`, `scorer`, `callbacks`,
    `prompts`, `run`, and what was given to it.
    """

    config: Config
    context: Any
    policy: Any
    scorer: Any
    callbacks: Any
    prompts: Any
    run: Any
    tokenizer: Any
    train_dataset: Any
    eval_dataset: Any
    reward_processing_classes: list[Any]
    _optimizer: Any
    _lr_scheduler: Any
    _result: Any
    _hub_model_id: str | None = None
    save_model: Any

    # --- what it is made of

    @property
    def args(self) -> Config:
        """The run's config."""
        return self.config

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def state(self) -> Any:
        """transformers' TrainerState: `log_history`, `global_step`, `epoch`, ..."""
        return self.callbacks.state

    @property
    def control(self) -> Any:
        """transformers' TrainerControl."""
        return self.callbacks.control

    @property
    def callback_handler(self) -> Any:
        """What calls the callbacks; its attribute `callbacks` is the list of them."""
        return self.callbacks

    @property
    def accelerator(self) -> Any:
        """accelerate's Accelerator."""
        return self.context.accelerator

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions; of a reward model its module."""
        loaded = [function.loaded() for function in self.scorer.functions]
        return [getattr(each, "model", None) or each for each in loaded]

    @property
    def reward_func_names(self) -> list[str]:
        """Their names, as they are logged."""
        return [function.name for function in self.scorer.functions]

    @property
    def reward_weights(self) -> Any:
        """Their weights, a tensor."""
        import torch

        return torch.tensor(self.scorer.weights, dtype=torch.float32)

    @property
    def ref_model(self) -> Any:
        """The reference of the KL penalty, a module; None where there is none (beta 0), or where it is the model with
        its adapter switched off. Before `train` it is the policy as it is now."""
        if self.run is None and self.context.spec.beta and not self.policy.has_adapter and not self.policy.reference:
            self.policy.freeze_reference()
        return self.policy.reference

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of a mixture of experts is trained."""
        return self.policy.routers is not None

    @property
    def optimizer(self) -> Any:
        """Of the run, or as `create_optimizer` left it; None before."""
        return self._optimizer if self.run is None else self.run.learner.optimizer

    @optimizer.setter
    def optimizer(self, value: Any) -> None:
        self._optimizer = value

    @property
    def lr_scheduler(self) -> Any:
        """Of the run, or as `create_scheduler` left it; None before."""
        return self._lr_scheduler if self.run is None else self.run.learner.scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, value: Any) -> None:
        self._lr_scheduler = value

    def get_train_dataloader(self) -> Any:
        """An epoch of rows as they are trained on: a batch is the rows of one step, each as often as it is sampled."""
        from torch.utils.data import DataLoader

        plan, prompts = self.context.plan, self.prompts.prompts
        steps = range(1, max(len(prompts) // plan.prompts, 1) + 1)
        rows = [p.row for step in steps for p in self.prompts[step] for _ in range(plan.num_generations)]
        return DataLoader(rows, batch_size=plan.rows, collate_fn=list)  # type: ignore[arg-type]

    # --- what it is asked

    def is_world_process_zero(self) -> bool:
        """Whether this is the first of all processes."""
        return bool(self.context.ranks.is_main)

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return bool(self.context.accelerator.is_local_main_process)

    def add_callback(self, callback: Any) -> None:
        """Add a TrainerCallback, or make one of the class given."""
        self.callbacks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Take out this callback, or the first of this class."""
        self.callbacks.pop(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Take out this callback, or the first of this class, and return it; None where there is none."""
        return self.callbacks.pop(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Takes an entry of the log: into `state.log_history`, and to the callbacks. A subclass may add to it."""
        self.callbacks.write(logs)

    # --- what it writes into `args.output_dir`, as transformers does

    def metrics_format(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The numbers as people read them."""
        return dict(trainer_pt_utils.metrics_format(dict(metrics)))

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Prints the numbers of a split (`train`, `eval`)."""
        trainer_pt_utils.log_metrics(self, split, dict(metrics))

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Writes the numbers to `<split>_results.json`, and with `combined` into `all_results.json`."""
        Path(self.config.run.output_dir).mkdir(parents=True, exist_ok=True)
        trainer_pt_utils.save_metrics(self, split, dict(metrics), combined)

    def save_state(self) -> None:
        """Writes `state` to `trainer_state.json`."""
        if self.is_world_process_zero():
            Path(self.config.run.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(Path(self.config.run.output_dir) / "trainer_state.json"))

    def end(self) -> None:
        """Ends what is still open; a run closes its trackers and process groups itself."""

    # --- the hub

    @property
    def hub_model_id(self) -> str | None:
        """Of the repository that `push_to_hub` made or found; before, as it was given."""
        return self._hub_model_id or getattr(self.config, "hub_model_id", None)

    def create_model_card(self, model_name: Any = None, dataset_name: Any = None, tags: Any = (), **more: Any) -> None:
        """Writes the model's card, `README.md`, into `output_dir`: data, algorithm, before and after, how to reproduce.

        Args:
            model_name: in the title; None = that of the run. dataset_name, tags: in the card's data.
            more: of transformers' Trainer; what the card has no place for is left out.
        """
        if self.is_world_process_zero():
            self._write_card(Path(self.config.run.output_dir), model_name, dataset_name or more.get("dataset"), tags)

    def _write_card(self, folder: Path, model_name: Any, dataset_name: Any, tags: Any) -> None:
        write_card(
            folder,
            self.config,
            self.context.spec,
            self._result,
            model_name=model_name if isinstance(model_name, str) else self.context.folder.path.name,
            dataset_name=dataset_name,
            tags=tags or (),
        )

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **options: Any) -> Any:
        """Uploads the model of the run and its card to the hub; returns huggingface_hub's CommitInfo.

        Args:
            commit_message: of the upload. blocking: of transformers; the upload is always waited for.
            options: token, revision, and what `create_model_card` takes.

        Raises:
            ConfigError: the hub refuses, or cannot be reached; the model is where it was.
        """
        folder = self.context.folder.model
        if not folder.exists():
            self.save_model()
        if not self.is_world_process_zero():
            return None
        card = {name: options.get(name) for name in ("model_name", "dataset_name", "tags")}
        self._write_card(folder, **card)
        name = Path(self.config.run.output_dir).name
        done = upload(folder, self.config, default_name=name, commit_message=commit_message, **options)
        self._hub_model_id = done.repo_url.repo_id
        return done
