"""The stand-in for vLLM in a process of its own, for a host of its own: `python host_server.py ADDRESS PORT`."""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_pg.config.schema import ModelConfig
from llm_pg.model.loading import character_tokenizer, load_model
from tests.faults.tiny_run import SIZES
from tests.sampling.fake_vllm import FakeVllm

if __name__ == "__main__":
    tokenizer = character_tokenizer()
    FakeVllm(load_model(ModelConfig(make=SIZES), tokenizer, seed=0), tokenizer, address=(sys.argv[1], int(sys.argv[2])))
    threading.Event().wait()
