"""How an engine is built: its slots, its steps, its bounds."""

from __future__ import annotations

from pydantic import Field

from ftray.config.strict import Strict


class EngineOptions(Strict):
    slots: int = Field(32, ge=1, le=4096)
    """Requests that are decoded at once; each has a slot of `context` places for keys and values."""
    context: int | None = Field(None, ge=8)
    """Places of a slot: virtual tokens, prompt and answer together. null: what the base allows, at most 4,096."""
    step_tokens: int | None = Field(None, ge=8)
    """Tokens of one step while answers are being decoded: a long prompt is read in pieces of what they leave of it.
    null: twice the slots on a CPU, 512 more than the slots on a GPU."""
    prompt_tokens: int | None = Field(None, ge=8)
    """Tokens of one step while nothing is being decoded. null: 256 on a CPU, 4,096 on a GPU."""
    queue: int = Field(256, ge=0)
    """Requests that wait for a slot; one more is refused."""
    tenant_queue: int = Field(128, ge=0)
    """The same for each tenant."""
    tenant_slots: int | None = Field(None, ge=1)
    """Slots that one tenant may hold while others wait. null: all."""
    adapters: int | None = Field(None, ge=1)
    """Adapters on the device, of any size. With fewer than slots, a request that is next and finds all of them in use
    makes the one that is there for longest leave: it gets no more requests until its place is free. null: as many as
    slots."""
    adapter_memory: int = Field(4 << 30, ge=0)
    """Bytes of adapters that are kept in the host's memory while no request uses them."""
    load_threads: int = Field(2, ge=1, le=16)
    """Adapters that are read at once. Tenants take turns, so that none waits for all that another has asked for."""
    reuse_prefixes: bool = True
    """Keys and values of an earlier prompt serve a later one that begins with the same tokens, for the same tenant and
    the same adapter."""

    def places(self, positions: int | None) -> int:
        """`context` on a base of so many positions; None: it does not say."""
        return self.context or min(4096, positions or 4096)

    def reads(self, gpu: bool) -> int:
        """`prompt_tokens` on such a device."""
        return self.prompt_tokens or (4096 if gpu else 256)
