"""A tiny model learns to call a tool with the right argument, on a CPU: as a function, as an environment, over MCP.

    python tool_calls.py [function | environment | mcp] [max_steps=80 ...]

A question names three letters and marks one, the tool tells the code of a letter, and the code of the marked one is the
answer, which is paid only after a call. Demonstrations at the start look up any of the three letters, so that the model
knows the form of a call and has to find out by its reward which letter to ask for.
"""

from __future__ import annotations

import json
import random
import string
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from llm_pg import shipped
from llm_pg.config import Config, load_config
from llm_pg.metrics import read_metrics

KINDS = ("function", "environment", "mcp")


def look(x: str) -> str:
    """Tells the code of a letter.

    Args:
        x: the letter
    """
    return str(zlib.crc32(x.encode()) % 10)


def answered(completions: list[Any], answer: list[str]) -> list[float]:
    """1 for the right answer after a call."""
    return [
        float(len(said) > 1 and said[-1]["content"] == right) for said, right in zip(completions, answer, strict=True)
    ]


class Codebook:
    """The same tool as an environment: each episode has its own codes, which its row gives."""

    def reset(self, letters: list[str], codes: list[str], **row: Any) -> None:
        self.codes, self.asked = dict(zip(letters, codes, strict=True)), []  # type: dict[str, str], list[str]

    def look(self, x: str) -> str:
        """Tells the code of a letter.

        Args:
            x: the letter
        """
        self.asked.append(x)
        return self.codes[x]


def asked_once(environments: list[Codebook], completions: list[Any], answer: list[str]) -> list[float]:
    """1 for the right answer after a single look-up: a reward that reads the environments."""
    return [
        float(completion[-1]["content"] == right and len(environment.asked) == 1)
        for environment, completion, right in zip(environments, completions, answer, strict=True)
    ]


def serve() -> None:
    """The same tool as an MCP server, over stdin and stdout."""
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("codes")
    server.tool()(look)
    server.run("stdio")


def make_rows(count: int, rng: random.Random, secret: bool) -> list[dict[str, Any]]:
    """Questions with their answers. secret: the codes are drawn for each row, and only its environment knows them."""
    rows = []
    for _ in range(count):
        letters = rng.sample(string.ascii_lowercase, 3)
        codes = [str(rng.randrange(10)) if secret else look(letter) for letter in letters]
        right = rng.randrange(3)
        question = "".join(letter + " !"[place == right] for place, letter in enumerate(letters))
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "answer": codes[right], "letters": letters, "codes": codes})
    return rows


def demonstration(row: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """A conversation that looks up any of the letters and repeats its code, as the template writes it."""
    place = rng.randrange(3)
    call = json.dumps({"name": "look", "arguments": {"x": row["letters"][place]}})
    code = row["codes"][place]
    said = f"<tool_call>{call}</tool_call><eos>\n[{code}]\na:{code}"
    return {"prompt": f"look\nu:{row['prompt'][0]['content']}\na:", "completion": said}


def configured(kind: str, overrides: list[str], folder: Path) -> Config:
    """The shipped config with this kind of tool and files of demonstrations."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    demos = folder / "demonstrations.jsonl"
    rows = make_rows(2048, rng, kind == "environment")
    demos.write_text("".join(json.dumps(demonstration(row, rng)) + "\n" for row in rows))
    here = Path(__file__).resolve()
    server = {"codes": {"command": sys.executable, "args": [str(here), "serve"]}}
    of_kind = {
        "function": [f"tools=[{here}:look]", f"reward_funcs=[{here}:answered]"],
        "environment": [f"environment_factory={here}:Codebook", f"reward_funcs=[{here}:asked_once]"],
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
