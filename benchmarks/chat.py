"""The same questions through a model's chat template, answered greedily by our engine and by transformers' generate:
are the prompts the same tokens, are the answers, is the accuracy?

python -m benchmarks.chat MODEL LAYOUT=PATH [--num 100] [--max-new 256] [--system TEXT]
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinkmid.data import questions
from thinkmid.data.wording import Wording, WordingConfig
from thinkmid.eval import stats
from thinkmid.model import hf_config, weights
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Sampling
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.grade.grader import make_grader
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request

ANSWER = "Solve the problem step by step. End with one line of the form\nAnswer: <the number alone>"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("set", metavar="LAYOUT=PATH")
    parser.add_argument("--num", type=int, default=100, help="first questions of the set (default: %(default)s)")
    parser.add_argument("--max-new", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--system", default=ANSWER, help="system message")
    args = parser.parse_args()
    layout, _, path = args.set.partition("=")
    asked = questions.load(layout, path).questions[: args.num]
    cfg = WordingConfig(template="chat", system=args.system)
    wording = Wording.read(cfg, args.model, Tokenizer.load(args.model))
    prompts = [Prompt(id=q.id, tokens=wording.tokens(q)) for q in asked]
    theirs = AutoTokenizer.from_pretrained(args.model)
    for q, prompt in zip(asked, prompts, strict=True):
        talk = [{"role": "system", "content": args.system}, {"role": "user", "content": questions.posed(q).text}]
        wanted = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert prompt.tokens == wanted, f"{q.id}: the prompts differ"
    answers = {"ours": ours(args, wording.tokenizer, prompts), "transformers": by_transformers(args, theirs, prompts)}
    ends = set(wording.tokenizer.eos_ids)
    texts = {
        who: [wording.tokenizer.decode([i for i in ids if i not in ends]) for ids in answers[who]] for who in answers
    }
    same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"], strict=True))
    row: dict[str, object] = {"model": args.model, "set": args.set, "num": len(asked), "same_texts": same}
    with closing(make_grader(VerifyConfig())) as grader:
        for who, said in texts.items():
            verdicts = [grader(text, q.gold, q.question) for q, text in zip(asked, said, strict=True)]
            right = sum(bool(verdict.result().value) for verdict in verdicts)
            row[who] = {"right": right, "interval": interval(right, len(asked))}
    print(json.dumps(row))


def interval(right: int, num: int) -> list[float]:
    found = stats.proportion(np.array([1.0] * right + [0.0] * (num - right)))
    return [round(found.low, 3), round(found.high, 3)]


def ours(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[Prompt]) -> list[list[int]]:
    engine = NativeEngine(hf_config.read_config(args.model), tokenizer)
    engine.load_weights(weights.stream_folder(args.model, "float32"), 0)
    sampling = Sampling(temperature=0.0, max_think=args.max_new, max_suffix=0, max_batch=16)
    requests = [Request(prompt=prompt, seed=0, key=(i,)) for i, prompt in enumerate(prompts)]
    done = {request.key[0]: sample for step in engine.generate(requests, sampling) for request, sample in step}
    return [done[i].tokens.tolist() for i in range(len(prompts))]


@torch.no_grad()
def by_transformers(args: argparse.Namespace, tokenizer: AutoTokenizer, prompts: list[Prompt]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new, do_sample=False)
        out.append(written[0, ids.shape[1] :].tolist())
    return out


if __name__ == "__main__":
    main()
