"""A tiny model learns on a CPU which call of a tool answers a question: a function, an environment, an MCP server.

    python tool_calls.py function | environment | mcp [--start FOLDER] [max_steps=100 seed=0 ...]

A question names one of four boxes, the tool tells the digit in a box, and that digit is the answer, which is paid only
after a call. All three kinds start from one model, which the first of them makes. Its demonstrations look into the next
box more often than into the one that is asked for: so it knows the form of a call and how to repeat what a tool says,
does it wrong, and has to find out by its reward which box to ask for.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from pathlib import Path
from typing import Any

from llm_pg import shipped
from llm_pg.config import Config, load_config
from llm_pg.metrics import read_metrics

KINDS = ("function", "environment", "mcp")
BOXES = 4
RIGHT = 0.3  # of the demonstrations look into the box that is asked for


def look(x: int) -> str:
    """Tells the digit in a box.

    Args:
        x: number of the box
    """
    return str(zlib.crc32(str(x).encode()) % 10)


def answered(completions: list[Any], answer: list[str]) -> list[float]:
    """1 for the right answer after a call."""
    pairs = zip(completions, answer, strict=True)
    return [float(len(said) > 1 and said[-1]["content"] == right) for said, right in pairs]


class Boxes:
    """The same tool as an environment: each episode has its own digits, which its row gives."""

    def reset(self, digits: list[str], **row: Any) -> None:
        self.digits, self.opened = digits, []  # type: list[str], list[int]

    def look(self, x: int) -> str:
        """Tells the digit in a box.

        Args:
            x: number of the box
        """
        self.opened.append(x)
        return self.digits[x]


def opened_once(environments: list[Boxes], completions: list[Any], answer: list[str]) -> list[float]:
    """1 for the right answer after a single look: a reward that reads the environments."""
    return [
        float(said[-1]["content"] == right and len(environment.opened) == 1)
        for environment, said, right in zip(environments, completions, answer, strict=True)
    ]


def serve() -> None:
    """The same tool as an MCP server, over stdin and stdout."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("boxes")
    server.tool()(look)
    server.run("stdio")


def make_rows(count: int, rng: random.Random, secret: bool) -> list[dict[str, Any]]:
    """Questions with their answers. secret: the digits are drawn for each row, and only its environment knows them."""
    rows = []
    for place in range(count):
        digits = [str(rng.randrange(10)) if secret else look(x) for x in range(BOXES)]
        box = rng.randrange(BOXES)
        prompt = [{"role": "user", "content": f"{place:04d} box {box}?"}]
        rows.append({"prompt": prompt, "answer": digits[box], "digits": digits, "box": box})
    return rows


def demonstration(row: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """A conversation that looks into the box asked for (3 of 10) or into the next one, and repeats its digit."""
    x = row["box"] if rng.random() < RIGHT else (row["box"] + 1) % BOXES
    call = f'<tool_call>{{"name": "look", "arguments": {{"x": {x}}}}}</tool_call>'
    digit = row["digits"][x]  # all as the template writes it
    completion = f"{call}<eos>\n[{digit}]\na:{digit}"
    return {"prompt": f"look\nu:{row['prompt'][0]['content']}\na:", "completion": completion}


def configured(kind: str, overrides: list[str]) -> Config:
    """The shipped config with this kind of tool."""
    here = Path(__file__).resolve()
    server = {"boxes": {"command": sys.executable, "args": [str(here), "serve"]}}
    of_kind = {
        "function": [f"tools=[{here}:look]", f"reward_funcs=[{here}:answered]"],
        "environment": [f"environment_factory={here}:Boxes", f"reward_funcs=[{here}:opened_once]"],
        "mcp": [f"mcp_servers={json.dumps(server)}", f"reward_funcs=[{here}:answered]"],
    }[kind]
    return load_config(shipped.find("tool_calls.yaml"), [*of_kind, f"run_name=tool_calls_{kind}", *overrides])


def make_start(folder: Path, overrides: list[str]) -> None:
    """Trains a model on demonstrations, whose digits are drawn for each, and saves it with its tokenizer."""
    from llm_pg import RLOOTrainer
    from llm_pg.run.before.warm_start import warm_start

    rng, file = random.Random(0), folder / "demonstrations.jsonl"
    config = configured("function", [*overrides, f"warm_start_data_files={file}", "seed=0"])
    rows = make_rows(min(config.warm_start.warm_start_steps * 64, 8192), rng, secret=True)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(demonstration(row, rng)) + "\n" for row in rows))
    trainer = RLOOTrainer(args=config, train_dataset=rows)
    loss = warm_start(trainer.model, trainer.tokenizer, trainer.config, held_out=())
    trainer.save_model(folder)
    print(f"{folder}: the model to start from, loss {loss:.3f} nats per token.")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--start", type=Path, default=Path("runs/tool_calls_start"), help="model to start from")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    given = parser.parse_intermixed_args(arguments)
    if not (given.start / "config.json").is_file():
        make_start(given.start, given.overrides)
    start = ["model.make=null", f"model_name_or_path={given.start}", "warm_start_steps=0"]
    config = configured(given.kind, [*given.overrides, *start])
    from llm_pg import RLOOTrainer

    rows = make_rows(2048, random.Random(config.run.seed + 1), secret=given.kind == "environment")
    summary = RLOOTrainer(args=config, train_dataset=rows).train()
    lines = read_metrics(Path(summary["model"]).parent / "metrics.jsonl")
    rates = [summary[f"pass_rate_{when}_interval"] for when in ("before", "after")]
    told = " -> ".join(f"{rate:.0%} [{low:.0%}, {high:.0%}]" for rate, low, high in rates)
    print(f"\n{given.kind}: right answers {told} (greedy, held out), {summary['seconds_total']:.0f} s.")
    for name in ("reward", "log/tools/call_frequency", "log/tools/failure_frequency"):
        print(f"{name}: {lines[0][name]:.2f} -> {lines[-1][name]:.2f}")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
