"""A tiny model calls a tool, on a CPU: as a function, as an environment, over MCP.

    python tool_calls.py [function | environment | mcp] [max_steps=40 ...]

A question names one of four boxes, the tool tells the digit in a box, and that digit is the answer, which is paid only
after a call. Demonstrations at the start look into any of the four boxes, so that the model knows the form of a call
and has to find out by its reward which box to ask for.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from llm_pg import shipped
from llm_pg.config import Config, load_config
from llm_pg.metrics import read_metrics

KINDS = ("function", "environment", "mcp")
BOXES = 4


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
        asked = rng.randrange(BOXES)
        prompt = [{"role": "user", "content": f"{place:04d} box {asked}?"}]
        rows.append({"prompt": prompt, "answer": digits[asked], "digits": digits})
    return rows


def demonstration(row: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """A conversation that looks into any of the boxes and repeats its digit, as the template writes it."""
    x = rng.randrange(BOXES)
    call = json.dumps({"name": "look", "arguments": {"x": x}})
    digit = row["digits"][x]
    said = f"<tool_call>{call}</tool_call><eos>\n[{digit}]\na:{digit}"
    return {"prompt": f"look\nu:{row['prompt'][0]['content']}\na:", "completion": said}


def configured(kind: str, overrides: list[str], folder: Path) -> Config:
    """The shipped config with this kind of tool and files of demonstrations."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    demos = folder / "demonstrations.jsonl"
    rows = make_rows(2048, rng, kind == "environment")
    demos.write_text("".join(json.dumps(demonstration(row, rng)) + "\n" for row in rows))
    here = Path(__file__).resolve()
    server = {"boxes": {"command": sys.executable, "args": [str(here), "serve"]}}
    of_kind = {
        "function": [f"tools=[{here}:look]", f"reward_funcs=[{here}:answered]"],
        "environment": [f"environment_factory={here}:Boxes", f"reward_funcs=[{here}:opened_once]"],
        "mcp": [f"mcp_servers={json.dumps(server)}", f"reward_funcs=[{here}:answered]"],
    }[kind]
    given = [*of_kind, f"warm_start_data_files={demos}", f"run_name=tool_calls_{kind}", "log_completions=2", *overrides]
    return load_config(shipped.find("tool_calls.yaml"), given)


def main(arguments: list[str]) -> None:
    kind = arguments[0] if arguments and arguments[0] in KINDS else "function"
    config = configured(kind, [word for word in arguments if word != kind], Path("runs/tool_calls_data"))
    from llm_pg import RLOOTrainer

    begin = time.perf_counter()
    rows = make_rows(1024 + 128, random.Random(1), kind == "environment")
    summary = RLOOTrainer(args=config, train_dataset=rows).train()
    folder = Path(summary["model"]).parent
    lines = read_metrics(folder / "metrics.jsonl")
    calls = [line["log/tools/call_frequency"] for line in (lines[0], lines[-1])]
    failed = [line["log/tools/failure_frequency"] for line in (lines[0], lines[-1])]
    print(f"\n{kind}: right answers {summary['pass_rate_before']:.0%} -> {summary['pass_rate_after']:.0%} (greedy,")
    print(f"held out), calls an episode {calls[0]:.2f} -> {calls[1]:.2f}, of which failed {failed[0]:.0%} ->")
    print(f"{failed[1]:.0%}, {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(sys.argv[1:])
