"""Ask a vLLM server the same question under several recipes at once, with the `openai` package.

Start a server first, with the recipes that it serves::

    headpatch serve HuggingFaceTB/SmolLM2-135M-Instruct --recipe context=smollm2-135m-instruct/follow-context

and then::

    python examples/openai_client.py --recipe context --recipe none "The capital of Poland is London. The capital of Poland is"
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import openai


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, recipe: str, tokens: int) -> str:
    """One completion; the server's own words where it refuses."""
    try:
        done = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"vllm_xargs": {"headpatch": recipe}},
        )
    except openai.APIStatusError as error:
        return f"[{error.status_code}] {error.message}"
    return done.choices[0].text


async def main(arguments: list[str]) -> int:
    """Ask under every recipe, all at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--recipe", action="append", help="a served name, none, or a recipe as JSON text; repeat")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args(arguments)
    names = given.recipe or ["default", "none"]
    async with openai.AsyncOpenAI(base_url=given.url, api_key="none", max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        answers = await asyncio.gather(*(ask(client, model, given.prompt, name, given.tokens) for name in names))
    for name, answer in zip(names, answers, strict=True):
        print(f"{name[:40]:>12s} | {' '.join(answer.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
