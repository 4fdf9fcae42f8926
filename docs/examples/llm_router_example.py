"""What the router does, step by step: run it with `python docs/examples/llm_router_example.py`.

Only the last step asks a provider of this machine; what it finds depends on what is installed,
configured and running here.
"""

import asyncio

from promptmesh import (
    RouterDeps,
    agenerate_text,
    clear_llm_router_caches,
    generate_text,
    get_last_generation_trace,
    get_llm_provider,
    register_llm_provider,
    stream_text,
)


class Shouting:
    """A provider of one's own: a method `generate` is enough; `stream` makes it come in pieces."""

    def generate(self, prompt, *, model_name=None, **kwargs):
        return "".join(self.stream(prompt, model_name=model_name, **kwargs))

    def stream(self, prompt, *, model_name=None, **kwargs):
        for word in prompt.split():
            yield word.upper() + " "


def own_provider() -> None:
    register_llm_provider("shouting", Shouting)
    print("own provider:  ", generate_text("hello mesh", provider="shouting"))
    print("streamed:      ", list(stream_text("piece by piece", provider="shouting")))


def cached() -> None:
    question = "what is two and two"
    generate_text(question, provider="shouting")
    generate_text(question, provider="shouting")
    trace = get_last_generation_trace()
    print("asked again:   ", trace["cache"], trace["cid"])
    clear_llm_router_caches()
    generate_text(question, provider="shouting")
    print("after clearing:", get_last_generation_trace()["cache"])


def shared() -> None:
    with RouterDeps() as deps:
        provider = get_llm_provider("echo", deps=deps)
        print("by its handle: ", provider.generate("first"))
        print("as an instance:", generate_text("second", provider_instance=provider, deps=deps))
        print("shared:        ", len(deps.router_cache), "entries")


async def many_at_once() -> None:
    prompts = ["one", "two", "three"]
    texts = await asyncio.gather(*(agenerate_text(p, provider="shouting") for p in prompts))
    print("many at once:  ", texts)


def whatever_is_here() -> None:
    try:
        print("found here:    ", generate_text("Say hello.", max_tokens=20, timeout=60))
        print("answered by:   ", get_last_generation_trace()["provider"])
    except RuntimeError as error:
        print("found here:     nothing that can be used:", error)


if __name__ == "__main__":
    own_provider()
    cached()
    shared()
    asyncio.run(many_at_once())
    whatever_is_here()
